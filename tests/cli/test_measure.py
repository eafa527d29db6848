"""``measure``: its numbers are those of the functions, on the same weights and samples."""

from __future__ import annotations

import io
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from runs import Classifier, data, mlp, trainer
from terminal import Terminal
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import Spectrum, curvature, linalg
from lightning_plasticity.cli import main
from lightning_plasticity.demo.network import Plain
from lightning_plasticity.streams import RandomLabelDigits

HERE = __name__


class Net(L.LightningModule):
    """Hyperparameters are in its checkpoints."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 3))
        self.scale = scale

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        print("words of the user's own")
        return F.cross_entropy(self.net(batch[0]) * self.scale, batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Numbers(TensorDataset):
    def __init__(self, samples: int = 30) -> None:
        super().__init__(*data(samples=samples))


class Data(L.LightningDataModule):
    def __init__(self, task: int = 0) -> None:
        super().__init__()
        self.task = task

    def setup(self, stage: str) -> None:
        self.tensors = data(self.task, samples=30)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*self.tensors), batch_size=8)


class Small(nn.Sequential):
    """No LightningModule."""

    def __init__(self) -> None:
        super().__init__(*mlp())


class Stepping(Small, L.LightningModule):
    """Its step does what ``does`` names."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.does = does

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1]) + torch.zeros((), device=self.device)
        if self.does == "logs":
            self.log("loss", loss, prog_bar=True)
        elif self.does == "epoch":
            loss = loss + self.current_epoch + self.trainer.current_epoch
        elif self.does == "logger":
            self.logger.log_metrics({"loss": 1.0})  # type: ignore[union-attr]
        elif self.does == "optimizers":
            self.optimizers()
        return loss


class Halving(Net):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] / 2, batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 1, batch[1]


class Doubling(Data):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 4, batch[1]


class Asking(Data):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch if self.trainer.training else None  # type: ignore[union-attr]


@pytest.fixture(autouse=True)
def found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest imports this file under a name that is no import path."""
    monkeypatch.setitem(sys.modules, "measured_here", sys.modules[HERE])


def measured(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["measure", *words, "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1
    found: dict[str, Any] = json.loads(shown.out)
    return found


def same(found: dict[str, Any], spectrum: Any, eps: float = 1e-2) -> None:
    expected = {
        f"eps_rank_{eps:g}": spectrum.epsilon_rank(eps),
        "effective_rank": spectrum.effective_rank(),
        "trace": spectrum.trace(),
        "lambda_max": spectrum.lambda_max(),
        "lambda_min": spectrum.lambda_min(),
    }
    for key, value in expected.items():
        have = found["values"][key]
        assert [have["value"], have["lower"], have["upper"]] == pytest.approx([value.value, value.lower, value.upper])
        assert have["exact"] == value.exact
    assert (found["num_params"], found["num_samples"]) == (spectrum.num_params, spectrum.num_samples)


@pytest.mark.parametrize("matrix", ["ggn", "hessian", "ntk", "kronecker"])
def test_a_stream_and_a_class(matrix: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--module", "measured_here.Net", "--init", "width=5", '{"scale": 2.0}', "--matrix", matrix]
    found = measured(
        capsys, *words, "--data", "measured_here.Data", "--data-init", "task=1", "--samples", "12", "--eps", "1e-2"
    )
    torch.manual_seed(0)
    net, batches = Net(5, 2.0), [tuple(t[a:b] for t in data(1, 30)) for a, b in ((0, 8), (8, 12))]
    spectrum = getattr(curvature, f"{matrix}_spectrum")(net, None, batches)
    same(found, spectrum)
    assert found["exact"] == (matrix != "kronecker")
    if matrix == "hessian":
        assert found["values"]["negative_fraction"]["value"] == spectrum.negative_fraction().value


def test_an_estimate_has_intervals_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--module", "lightning_plasticity.demo.network.Plain", "--matrix", "hessian", "--samples", "16"]
    words += ["--data", "lightning_plasticity.streams.RandomLabelDigits", "--task", "2", "--eps", "0.01"]
    found = measured(capsys, *words)
    torch.manual_seed(0)
    net, stream = Plain(), RandomLabelDigits()
    stream.task_id = 2
    same(found, curvature.hessian_spectrum(net, None, [next(iter(stream.train_dataloader()))]))
    assert not found["exact"]
    assert main(["measure", *words]) == 0
    shown = capsys.readouterr().out
    assert "an estimate with 95 % intervals" in shown
    assert " to " in next(line for line in shown.splitlines() if line.startswith("eps_rank_0.01"))


@pytest.mark.parametrize("kind", ["npz", "pt", "pair"])
def test_a_checkpoint_and_a_file(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    net, (inputs, targets) = Net(6, 3.0), data(samples=20)
    run = trainer()
    run.fit(net, DataLoader(TensorDataset(inputs, targets), batch_size=10))
    run.save_checkpoint(tmp_path / "x.ckpt")
    file = tmp_path / f"data.{'npz' if kind == 'npz' else 'pt'}"
    if kind == "npz":
        np.savez(file, inputs=inputs.numpy(), targets=targets.numpy())
    else:
        torch.save((inputs, targets) if kind == "pair" else {"x": inputs, "y": targets}, file)
    capsys.readouterr()
    words = ["--module", "measured_here.Net", "--checkpoint", str(tmp_path / "x.ckpt"), "--data", str(file)]
    found = measured(capsys, *words, "--samples", "15", "--out", str(tmp_path / "out"))
    spectrum = curvature.ggn_spectrum(net, None, (inputs[:15], targets[:15]))
    same(found, spectrum)
    saved = Spectrum.load(tmp_path / "out" / "spectrum.npz")
    assert torch.equal(saved.eigenvalues, spectrum.eigenvalues)
    assert json.loads((tmp_path / "out" / "measure.json").read_text()) == found


def test_a_plain_module_a_dataset_and_features(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--module", "measured_here.Small", "--data", "measured_here.Numbers", "--eps", "1e-2"]
    found = measured(capsys, *words, "--loss", "torch.nn.functional.cross_entropy", "--features")
    torch.manual_seed(0)
    net, pair = Small(), data(samples=30)
    same(found, curvature.ggn_spectrum(net, F.cross_entropy, pair))
    hidden = torch.relu(net[0](pair[0]))
    dead = float((hidden <= 0).all(0).double().mean())
    assert found["features"]["features/dead_units/1"]["value"] == dead
    rank = int((torch.linalg.svdvals(hidden.double()) > 0.01 * 30**0.5).sum())
    assert found["features"]["features/feature_rank/1"]["value"] == rank


WRONG = {
    "no class": (["--module", "measured_here.Nett"], "measured_here has no Nett. Did you mean 'Net'?"),
    "argument": (["--init", "widht=3"], "has no argument 'widht'"),
    "no value": (["--init", "width"], "--init has 'width', expected key=value or a JSON object"),
    "JSON": (["--init", "{width: 3}"], "is not valid JSON"),
    "no loss": (["--module", "measured_here.Small", "--init", "{}"], "its loss has to be given by --loss"),
    "no data": (["--data", "nowhere.pt"], "--data nowhere.pt cannot be read"),
    "a module as data": (["--data", "measured_here.Small"], "expected a datamodule, dataset or loader"),
    "no tasks": (["--task", "1"], "has no tasks"),
    "task": (["--data", "lightning_plasticity.streams.RandomLabelDigits", "--task", "16"], "has tasks 0 to 15"),
    "checkpoint": (["--checkpoint", "nowhere.ckpt"], "--checkpoint nowhere.ckpt is not a file"),
    "kronecker": (["--matrix", "kronecker", "--max-seconds", "1"], "kronecker takes no bound"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = WRONG[case]
    base = {"--module": "measured_here.Net", "--init": "width=4", "--data": "measured_here.Data"}
    given = [word for option, value in base.items() if option not in words for word in (option, value)]
    assert main(["measure", *given, *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_files_without_a_pair_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros(3))
    torch.save((torch.zeros(3, 2), torch.zeros(4)), tmp_path / "b.pt")
    for name, message in (
        ("a.npz", "holds images; expected arrays 'inputs' and"),
        ("b.pt", "has 3 inputs and 4 targets"),
    ):
        words = ["--module", "measured_here.Net", "--init", "width=4", "--data", str(tmp_path / name)]
        assert main(["measure", *words]) == 2
        assert message in capsys.readouterr().err


def test_nan_weights_are_a_failure_with_its_cause(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--module", "measured_here.Net", "--init", "width=4", "scale=.nan", "--data", "measured_here.Data"]
    assert main(["measure", *words, "--json"]) == 1
    shown = capsys.readouterr()
    assert "MeasurementError" in json.loads(shown.out)["error"]
    assert shown.err.endswith(f"lightning-plasticity: {json.loads(shown.out)['error']}\n")


def test_classifiers_of_the_other_tests_have_no_hyperparameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that does not say how its module is made is an error with its fix."""
    run = trainer()
    run.fit(Classifier(mlp()), DataLoader(TensorDataset(*data()), batch_size=4))
    run.save_checkpoint(tmp_path / "x.ckpt")
    words = ["--module", "runs.Classifier", "--checkpoint", str(tmp_path / "x.ckpt"), "--data", "measured_here.Data"]
    assert main(["measure", *words]) == 2
    assert "give them with --init" in capsys.readouterr().err


@pytest.mark.parametrize("does", ["logs", "epoch", "logger", "optimizers"])
def test_a_step_that_misses_a_trainer(does: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["measure", "--module", "measured_here.Stepping", "--init", f"does={does}", "--data", "measured_here.Data"]
    if does == "logs":
        assert main(words) == 0
        return
    assert main(words) == (1 if does == "logger" else 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "training_step failed" in said if does == "logger" else "training_step asks for the Trainer" in said
    assert "give --loss FUNCTION" in said
    assert main([*words, "--loss", "torch.nn.functional.cross_entropy"]) == 0


def test_batches_go_through_the_hooks_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--init", "width=5", "--samples", "12", "--eps", "1e-2"]
    for module, datamodule, change in (
        ("Halving", "Data", lambda x: x / 2 + 1),
        ("Halving", "Doubling", lambda x: x / 2 * 4),  # a datamodule's hook goes before the module's
        ("Net", "Doubling", lambda x: x * 4),
    ):
        found = measured(capsys, "--module", f"measured_here.{module}", "--data", f"measured_here.{datamodule}", *words)
        torch.manual_seed(0)
        net, (inputs, targets) = Net(5), data(0, 30)
        same(found, curvature.ggn_spectrum(net, None, (change(inputs[:12]), targets[:12])))
        capsys.readouterr()
    assert main(["measure", "--module", "measured_here.Net", "--data", "measured_here.Asking", *words]) == 1
    said = capsys.readouterr().err
    assert "on_after_batch_transfer failed: AttributeError" in said
    assert "with HessianSpectrumMonitor in the Trainer's callbacks" in said


def test_a_terminal_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["measure", "--module", "measured_here.Net", "--init", "width=5", "--data", "measured_here.Data"]
    monkeypatch.setattr(linalg, "watching", partial(linalg.watching, after=0, every=0))
    monkeypatch.setattr("lightning_plasticity.linalg.progress.COST", float("inf"))
    for stderr, more, shown in ((Terminal(), [], True), (Terminal(), ["--json"], False), (io.StringIO(), [], False)):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert main([*words, *more]) == 0
        text = stderr.getvalue()
        assert ("backward passes" in text) == shown
        assert ("\r" in text) == shown
        assert "backward passes" not in capsys.readouterr().out
        if shown:
            assert "ggn 8/8 backward passes" in stderr.seen  # type: ignore[attr-defined]
            assert not [row for row in stderr.rows if "ggn" in row]  # type: ignore[attr-defined]
