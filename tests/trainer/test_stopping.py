"""EarlyStopping and ModelCheckpoint on our values, wherever they stand in the list of callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from runs import Classifier, loader, mlp, monitors, same_with, trainer

from lightning_plasticity import EveryNEpochs, HessianSpectrumMonitor, TaskTracker

KEYS = ["plasticity/ggn/lambda_max", "plasticity/hessian/trace", "plasticity/features/effective_rank/net.1"]


def starts(watching: list[Any], key: str) -> list[float]:
    """A value at each task's start, in float32 as Lightning keeps it."""
    records = [record for monitor in watching for record in monitor.records if record.phase == "start"]
    return [float(torch.tensor(record.values[key].value)) for record in records if key in record.values]


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("key", KEYS)
def test_stop_and_save_on_our_values(key: str, mode: Any, ours_first: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    watching, stop = monitors(), EarlyStopping(key, patience=1, mode=mode, strict=True)
    save = ModelCheckpoint(tmp_path, "{epoch}", monitor=key, save_top_k=2, mode=mode)
    ours = [*watching, TaskTracker(EveryNEpochs(1))]
    run = trainer([*ours, stop, save] if ours_first else [stop, save, *ours], max_epochs=5, enable_checkpointing=True)
    run.fit(Classifier(mlp(), lr=0.2), loader(shuffle=True))
    found = starts(watching, key)
    best = min if mode == "min" else max
    worse = [epoch for epoch, value in enumerate(found) if value != best(found[: epoch + 1])]
    expected = worse[0] if worse else 4  # the first epoch without a new best one ends the run
    assert len(found) == expected + 1 == run.current_epoch
    assert stop.stopped_epoch == (expected if worse else 0)
    assert float(stop.best_score) == best(found)  # type: ignore[arg-type]
    kept = {Path(path).stem: float(value) for path, value in save.best_k_models.items()}
    top = sorted(range(len(found)), key=lambda epoch: found[epoch], reverse=mode == "max")[:2]
    assert kept == {f"epoch={epoch}": found[epoch] for epoch in top}
    assert Path(save.best_model_path).stem == f"epoch={top[0]}"


def test_callbacks_that_stop_on_other_values_stop_where_they_did() -> None:
    watching = monitors()

    def extra() -> list[Any]:
        return [EarlyStopping("loss_epoch", patience=0, mode="max")]

    settings: dict[str, Any] = {"max_epochs": 4}
    assert same_with(lambda: Classifier(mlp()), lambda: [loader()], watching, extra, **settings) == []


def test_a_value_that_could_not_be_measured_can_be_tolerated(tmp_path: Path) -> None:
    """As with any key that is missing: strict=False goes on."""

    class Unmeasurable(Classifier):
        def curvature_loss(self, batch: Any) -> Any:
            raise RuntimeError("no")

    stop = EarlyStopping(KEYS[0], strict=False)
    run = trainer([HessianSpectrumMonitor(), stop], max_epochs=2)
    with pytest.warns(UserWarning, match="could not measure") as told:
        run.fit(Unmeasurable(mlp()), loader())
    assert sum("HessianSpectrumMonitor could not measure" in str(each.message) for each in told) == 1
    assert run.current_epoch == 2
