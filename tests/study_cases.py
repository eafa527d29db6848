"""Small streams, modules and studies; importable by class path from the workers too."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_plasticity.nn import is_measuring

SEEN: list[float] = []  # what ``Logging`` computed, measuring included: nobody rolls this list back


class Stream(LightningDataModule):
    """Random labels on random inputs; shuffled by torch's own random state, which a resumed run must restore."""

    def __init__(self, num_tasks: int = 2, epochs_per_task: int = 2, samples: int = 24, seed: int = 0) -> None:
        super().__init__()
        self.num_tasks, self.epochs_per_task, self.samples, self.seed = num_tasks, epochs_per_task, samples, seed
        self.task_id: int | None = None

    def train_dataloader(self) -> DataLoader[Any]:
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        task = epoch // self.epochs_per_task if self.task_id is None else self.task_id
        generator = torch.Generator().manual_seed(1000 * self.seed + task)
        inputs = torch.randn(self.samples, 4, generator=generator)
        labels = torch.randint(3, (self.samples,), generator=generator)
        return DataLoader(TensorDataset(inputs, labels), batch_size=5, shuffle=True)


class Net(LightningModule):
    """Dropout draws from the global random state; the scheduler has a state of its own, as has ``calls``."""

    def __init__(self, width: int = 6, lr: float = 0.01) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 3))
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        out = self.net(batch[0])
        accuracy = (out.detach().argmax(1) == batch[1]).float().mean()
        return {"loss": F.cross_entropy(out, batch[1]), "accuracy": accuracy}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Logging(LightningModule):
    """The metric is logged, by the step or by the epoch only, as a number or a torchmetrics object."""

    def __init__(self, per_step: bool = True, as_object: bool = False) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.per_step, self.as_object = per_step, as_object
        self.metric = MulticlassAccuracy(3, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        accuracy = (out.detach().argmax(1) == batch[1]).float().mean()
        SEEN.append(float(accuracy))
        value: Any = accuracy
        if self.as_object:
            self.metric(out, batch[1])
            value = self.metric
        self.log("train/acc", value, on_step=self.per_step, on_epoch=not self.per_step, batch_size=1)
        return F.cross_entropy(out, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LoggingLater(Logging):
    """The metric is logged by a hook."""

    def on_train_batch_end(self, *args: Any) -> None:
        self.log("later", 0.5, on_step=False, on_epoch=True)


class Interrupts(Callback):
    """Presses Ctrl-C in the middle of a measurement."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        step = pl_module.training_step

        def pressing(*args: Any) -> Any:
            if is_measuring():
                raise KeyboardInterrupt
            return step(*args)

        pl_module.training_step = pressing


class Fails(Callback):
    """Raises in a task, if ``marker`` does not exist."""

    def __init__(self, task: int = 1, marker: str = "") -> None:
        self.task, self.marker = task, marker

    def on_task_start(self, trainer: Any, pl_module: Any, task: int) -> None:
        from pathlib import Path

        if task == self.task and not (self.marker and Path(self.marker).exists()):
            raise RuntimeError(f"meant to fail in task {task}")


class Dies(Callback):
    """Kills its process in a task, as often as ``directory`` has room for markers."""

    def __init__(self, directory: str, times: int = 1, task: int = 1) -> None:
        self.directory, self.times, self.task = directory, times, task

    def on_task_start(self, trainer: Any, pl_module: Any, task: int) -> None:
        import os
        import signal
        from pathlib import Path

        for k in range(self.times):
            marker = Path(self.directory) / f"died{k}"
            if task == self.task and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)


class Waits(Callback):
    """Gives a test the time to kill the run from outside, in a task."""

    def __init__(self, seconds: float = 60.0, task: int = 1, marker: str = "") -> None:
        self.seconds, self.task, self.marker = seconds, task, marker

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        import time
        from pathlib import Path

        tracker = next(callback for callback in trainer.callbacks if type(callback).__name__ == "TaskTracker")
        if tracker.task == self.task and batch_idx == 2 and not Path(self.marker).exists():
            Path(self.marker).touch()
            time.sleep(self.seconds)


def halve(module: LightningModule, factor: float = 0.5) -> None:
    """A transform that changes the module in place."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)


def plain_study(**changes: Any) -> dict[str, Any]:
    """Two methods, two seeds, two tasks, without figures' worth of monitors."""
    return {
        "module": "study_cases.Net",
        "stream": {"class_path": "study_cases.Stream", "init_args": {"num_tasks": 2}},
        "seeds": [0, 1],
        "trainer": {"accelerator": "cpu"},
        "measure": [{"class_path": "lightning_plasticity.FeatureRankMonitor", "init_args": {"when": "start"}}],
        "methods": {
            "plain": None,
            "l2er": {
                "regularizers": [
                    {
                        "class_path": "lightning_plasticity.EffectiveRank",
                        "init_args": {"strength": 0.1, "every_n_steps": 3},
                    },
                    {"class_path": "lightning_plasticity.L2", "init_args": {"strength": 1e-2}},
                ]
            },
        },
    } | changes


class OtherOptimizer(Net):
    """What a study's ``optimizer`` does, by hand."""

    def configure_optimizers(self) -> Any:
        return torch.optim.RMSprop(self.parameters(), lr=0.02)
