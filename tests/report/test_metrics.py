"""What loggers wrote beside the records, from real runs of Lightning and from broken files."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from report_cases import Seen, data_of, option_of, write_run
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import EveryNEpochs, FeatureRankMonitor, TaskTracker
from lightning_plasticity.cli import main
from lightning_plasticity.report import ReportError, write_report

STEPS, EPOCHS = 4, 2  # of a task
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "log_every_n_steps": 1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Counting(L.LightningModule):
    """Logs how many steps it has taken, so every mean is known."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        self.taken = 0

    def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.log("train_acc", float(self.taken))
        self.log("other", 1.0)
        self.taken += 1
        return self.net(batch[0]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(2 * STEPS, 3)), batch_size=2)


def in_one_fit(logger: Any, num_tasks: int = 3) -> None:
    callbacks = [TaskTracker(EveryNEpochs(EPOCHS)), FeatureRankMonitor(when=("start",))]
    L.Trainer(max_epochs=num_tasks * EPOCHS, logger=logger, callbacks=callbacks, **QUIET).fit(Counting())


def in_a_fit_each(loggers: Sequence[Any]) -> None:
    """A Trainer for each task: Lightning counts the steps from 0 again."""
    module, callbacks = Counting(), [FeatureRankMonitor(when=("start",))]
    for logger in loggers:
        L.Trainer(max_epochs=EPOCHS, logger=logger, callbacks=callbacks, **QUIET).fit(module)


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize("how", ["one fit", "a fit each", "a version each"])
def test_means_and_steps_of_tasks(tmp_path: Path, kind: Any, how: str) -> None:
    if how == "one fit":
        in_one_fit(kind(tmp_path))
    elif how == "a fit each":
        in_a_fit_each([kind(tmp_path)] * 3)
    else:
        in_a_fit_each([kind(tmp_path) for _ in range(3)])
    data = data_of(write_report(tmp_path, tmp_path / "r.html"))
    (line,) = option_of(data, "logged/train_acc")["lines"]
    length = STEPS * EPOCHS
    assert line["tasks"] == [0, 1, 2]
    assert line["value"] == [task * length + (length - 1) / 2 for task in range(3)]
    (series,) = data["logged"]  # and not "other"
    assert series["label"] == "train_acc"
    assert series["starts"] == [0, length, 2 * length]
    (drawn,) = series["lines"]
    assert drawn["steps"] == drawn["value"] == list(range(3 * length))
    assert len(data["groups"]) == 1
    if how == "a version each":
        assert data["groups"][0]["name"] == "lightning_logs/version_0 to version_2"


def test_runs_that_both_begin_at_task_0_stay_apart(tmp_path: Path) -> None:
    in_one_fit(CSVLogger(tmp_path), 1)
    in_one_fit(CSVLogger(tmp_path), 2)
    data = data_of(write_report(tmp_path, tmp_path / "r.html"))
    assert [group["name"] for group in data["groups"]] == ["lightning_logs/version_0", "lightning_logs/version_1"]


def test_joined_versions_keep_their_spectra(tmp_path: Path) -> None:
    write_run(tmp_path / "version_0", num_tasks=2)
    later = write_run(tmp_path / "version_10", num_tasks=4) / "plasticity.jsonl"
    lines = [line for line in later.read_text().splitlines() if json.loads(line)["task"] >= 2]
    later.write_text("\n".join(lines) + "\n")
    (heat,) = data_of(write_report(tmp_path, tmp_path / "r.html"))["heat"]
    assert heat["tasks"] == [0, 1, 2, 3]


def write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    with open(file, "w", newline="") as text:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_metric_is_asked_for_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    rows = [{"step": step, "val_acc": 0.5, "lr": step / 10, "classes": 3} for step in range(40)]
    write_csv(run / "metrics.csv", rows)
    assert [one["label"] for one in data_of(write_report(run, tmp_path / "r.html"))["logged"]] == ["val_acc"]
    page = write_report(run, tmp_path / "r.html", metrics=["lr"])
    (line,) = option_of(data_of(page), "logged/lr")["lines"]
    assert line["value"] == pytest.approx([0.45, 1.45, 2.45, 3.45])  # tasks begin at step 0, 10, 20, 30
    with pytest.raises(ReportError, match=r"No run logged 'acc'; expected a column .* among others: val_acc"):
        write_report(run, tmp_path / "r.html", metrics=["acc"])
    out = ["--out", str(tmp_path / "cli.html")]
    assert main(["report", str(run), "--metric", "lr", "--metric", "classes", *out]) == 0
    assert [one["label"] for one in data_of(tmp_path / "cli.html")["logged"]] == ["classes", "lr"]
    assert main(["report", str(run), "--metric", "acc", *out]) == 2
    assert "val_acc" in capsys.readouterr().err


LOGGED = (  # the names of torchmetrics are those of a MetricCollection
    "val_MulticlassAccuracy", "MulticlassAccuracy", "BinaryF1Score", "MulticlassAUROC", "MeanSquaredError", "trainAcc",
    "trainACC", "valLoss", "trainLoss", "MSELoss", "val/acc", "acc1", "Episode_Reward", "train_loss_epoch",
)  # fmt: skip
NOT_LOGGED = ("epoch", "lr-SGD", "accumulated", "Blossom", "isAccurate", "Accelerator", "glossary", "R2Score")


def test_names_of_accuracies_and_losses_are_known(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_csv(run / "metrics.csv", [{"step": 1, **dict.fromkeys(LOGGED + NOT_LOGGED, 0.5)}])
    page = write_report(run, tmp_path / "r.html")
    assert {one["label"] for one in data_of(page)["logged"]} == set(LOGGED)
    assert "Accuracy is not known" not in Seen(page).text


def test_names_that_say_nothing_are_listed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "no metrics.csv and no TensorBoard file" in Seen(write_report(run, tmp_path / "r.html")).text
    write_csv(run / "metrics.csv", [{"step": 1, "score": 0.5, "lr": 0.1, "plasticity/task": 0}])
    text = Seen(write_report(run, tmp_path / "r.html")).text
    assert "is named for an accuracy, return or loss (lr, score); show any by --metric NAME." in text
    assert "no metrics.csv" not in text
    with pytest.raises(ReportError, match=r"There are, among others: lr, score$"):
        write_report(run, tmp_path / "r.html", metrics=["acc"])


def test_files_above_and_below_the_records(tmp_path: Path) -> None:
    rows = [{"step": step, "acc": 1.0} for step in range(40)]
    above = write_run(tmp_path / "a" / "records")
    write_csv(tmp_path / "a" / "metrics.csv", rows)
    below = write_run(tmp_path / "b")
    (below / "csv").mkdir()
    write_csv(below / "csv" / "metrics.csv", rows)
    for directory in (above, below):
        assert [one["label"] for one in data_of(write_report(directory, tmp_path / "r.html"))["logged"]] == ["acc"]


def test_broken_files_are_a_note(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.csv").write_bytes(b"step,acc\n0,0.5\nx,1\n11,0.25\n12,,,\n,0.1\n21,0.")
    (run / "events.out.tfevents.1.host").write_bytes(b"no events, but many bytes of something else" * 9)
    page = write_report(run, tmp_path / "r.html")
    (line,) = option_of(data_of(page), "logged/acc")["lines"]
    assert (line["tasks"], line["value"]) == ([0, 1], [0.5, 0.25])
    text = Seen(page).text
    assert "metrics.csv could be read in part at most (ValueError: its last line was cut short)" in text
    assert text.count("events.out.tfevents.1.host could be read in part at most") == 1


def test_a_half_written_event_file_is_read_up_to_its_end(tmp_path: Path) -> None:
    in_one_fit(TensorBoardLogger(tmp_path))
    (file,) = tmp_path.rglob("*tfevents*")
    file.write_bytes(file.read_bytes()[:-10])
    data = data_of(write_report(tmp_path, tmp_path / "r.html"))
    assert option_of(data, "logged/train_acc")["lines"][0]["tasks"] == [0, 1, 2]


def test_a_resumed_run_counts_what_it_logged_last(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    steps = [*range(16), *range(12, 40)]  # went back to a checkpoint of step 12, in task 1
    write_csv(run / "metrics.csv", [{"step": step, "acc": float(k >= 16)} for k, step in enumerate(steps)])
    data = data_of(write_report(run, tmp_path / "r.html"))
    assert option_of(data, "logged/acc")["lines"][0]["value"] == [0.0, 0.8, 1.0, 1.0]


def test_steps_that_begin_anew_without_a_task_are_told(tmp_path: Path) -> None:
    rows = [{"step": step, "acc": task, "plasticity/task": task} for task in (0, 1) for step in (5, 9)]
    for name, kept in (("told", ("step", "acc", "plasticity/task")), ("untold", ("step", "acc"))):
        run = write_run(tmp_path / name, num_tasks=2)
        write_csv(run / "metrics.csv", [{key: row[key] for key in kept} for row in rows])
    data, text = data_of(page := write_report(tmp_path, tmp_path / "r.html")), Seen(page).text
    told, untold = option_of(data, "logged/acc")["lines"]
    assert (told["tasks"], told["value"]) == ([0, 1], [0, 1])
    assert untold["tasks"] == [0]  # both tasks' steps lie before step 10, where task 1 begins
    assert "untold/metrics.csv: acc goes back from step 9 to 5, and no row of plasticity/task tells the task" in text
    assert text.count("goes back") == 1
    run = write_run(tmp_path / "single", num_tasks=1)  # there is but one task to be at
    write_csv(run / "metrics.csv", [{"step": row["step"], "acc": 1} for row in rows])
    assert "goes back" not in Seen(write_report(run, tmp_path / "r.html")).text


def test_a_task_that_is_marked_twice_stays_moved(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_tasks=2)  # task 1 begins at step 10
    mark, value = {"acc": "", "plasticity/task": 1}, {"acc": 0.5, "plasticity/task": ""}
    rows = [{"step": 10, **mark}, {"step": 4, **value}, {"step": 15, **mark}, {"step": 12, **value}]  # 0 at its start
    write_csv(run / "metrics.csv", rows)
    (series,) = data_of(write_report(run, tmp_path / "r.html"))["logged"]
    assert series["lines"][0]["steps"] == [14, 22]


def test_accuracies_come_first_and_single_steps_after_means(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    names = ["a_loss_step", "b_loss", "c_acc_step", "d_acc"]
    write_csv(run / "metrics.csv", [{"step": 1, **dict.fromkeys(names, 0.5)}])
    data = data_of(write_report(run, tmp_path / "r.html"))
    assert [one["label"] for one in data["logged"]] == ["d_acc", "c_acc_step", "b_loss", "a_loss_step"]


def test_of_very_many_series_the_first_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    names = [f"acc{k:02}" for k in range(45)]
    write_csv(run / "metrics.csv", [{"step": 1, **dict.fromkeys(names, 0.5)}])
    page = write_report(run, tmp_path / "r.html")
    assert [one["label"] for one in data_of(page)["logged"]] == names[:40]
    assert "45 series are logged; shown are 40. Name others by --metric." in Seen(page).text


def test_long_series_are_drawn_as_means_of_neighbours(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    values = [(7 * step) % 11 for step in range(1800)]
    write_csv(run / "metrics.csv", [{"step": step, "acc": value} for step, value in enumerate(values)])
    (series,) = data_of(write_report(run, tmp_path / "r.html"))["logged"]
    assert series["lines"][0]["steps"] == list(range(1, 1800, 3))
    means = [statistics.fmean(values[at : at + 3]) for at in range(0, 1800, 3)]
    assert series["lines"][0]["value"] == pytest.approx(means, rel=1e-5)
