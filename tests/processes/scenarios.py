"""What the ranks run; each returns plain values for the tests to compare. Small, for every fit is run several times."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from runs import Classifier, Witness, data, leaves, mlp, outcome, trainer
from small_fits import Net
from torch import nn
from torch.distributed import _functional_collectives, all_reduce
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from lightning_plasticity import (
    ContinualBackprop,
    FeatureRankMonitor,
    HessianSpectrumMonitor,
    L2ERMixin,
    L2Init,
    LayerReset,
    ReDo,
    Regularization,
    ShrinkAndPerturb,
    SparseTopology,
    SpectralNorm,
    TaskTracker,
    TrainabilityProbe,
    Wasserstein,
)
from lightning_plasticity.callbacks.schedules import EveryNEpochs, TaskAttribute
from lightning_plasticity.metrics import (
    ApproximateRank,
    DormantUnitRatio,
    EffectiveRank,
    FeatureRank,
    SRank,
    StableRank,
)

ACCELERATOR = os.environ.get("RANKS_ACCELERATOR", "cpu")
UNEVEN = 11  # samples, for two ranks
PIECES = {0: 7, 1: 4}  # of samples, where each rank has its own
SIZES = {0: 5, 1: 3}  # of a rank's batches
METRICS = {
    "effective": EffectiveRank,
    "stable": StableRank,
    "srank": SRank,
    "approximate": ApproximateRank,
    "feature": partial(FeatureRank, eps=1.0),
    "dormant": partial(DormantUnitRatio, tau=0.8),
}


def pair(**settings: Any) -> list[Any]:
    return [
        HessianSpectrumMonitor(("ggn", "hessian"), eps=0.01, probe_samples=32, max_seconds=None, **settings),
        FeatureRankMonitor(probe_samples=32, **settings),
    ]


def fits(
    rank: int,
    loaders: Sequence[Any],
    callbacks: Sequence[Any],
    make: Any = lambda: Classifier(mlp(), lr=0.02),
    **settings: Any,
) -> dict[str, Any]:
    """Fit on one loader after the other; what is left behind, with the monitors' records."""
    torch.manual_seed(0)
    module, eyes = make(), Witness()
    for loader in loaders:
        options = {"accelerator": ACCELERATOR, "devices": 2, "strategy": "ddp"} | settings
        run = trainer([*callbacks, eyes], **options)
        run.fit(module, loader)
    plasticity = {k: float(v) for k, v in run.callback_metrics.items() if k.startswith("plasticity")}
    return {
        "outcome": outcome(module, eyes, run),
        "state": {name: tensor.detach().clone() for name, tensor in module.net.state_dict().items()},
        "records": [r.to_dict() for c in callbacks for r in getattr(c, "records", [])],
        "metrics": plasticity,
        "zero": run.is_global_zero,
    }


def both(rank: int, loaders: Any, callbacks: Sequence[Any], *make: Any, **settings: Any) -> dict[str, Any]:
    """The same fits with and without callbacks; the names of what differs, and all that the first left behind."""
    plain = fits(rank, loaders(), [], *make, **settings)
    watched = fits(rank, loaders(), callbacks, *make, **settings)
    differing = [key for key in plain["outcome"] if plain["outcome"][key] != watched["outcome"][key]]
    return watched | {"differs": differing}


def dataset(task: int = 0) -> TensorDataset:
    return TensorDataset(*data(task, UNEVEN))


def whole_loader(task: int) -> DataLoader[Any]:
    return DataLoader(dataset(task), batch_size=4, shuffle=True)


def map_style(rank: int, directory: Path) -> Any:
    """One dataset, dealt out by Lightning's DistributedSampler; files and loggers in one directory for all ranks."""
    loggers = [CSVLogger(directory, name="csv", version=""), TensorBoardLogger(directory, name="tb", version="")]
    return both(rank, lambda: [whole_loader(0), whole_loader(1)], pair(on_error="raise"), logger=loggers)


class Stream(IterableDataset[Any]):
    """Batches of the rank's own samples and sizes."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[Any]:
        for task in (1, 2):
            inputs, labels = data(10 * task + self.rank, SIZES[self.rank])
            yield inputs, labels


def stream(rank: int, directory: Path) -> Any:
    return both(rank, lambda: [DataLoader(Stream(rank), batch_size=None)], pair(on_error="raise"))


def resumed(rank: int, directory: Path) -> Any:
    """Cut in the middle of a task, and gone on with from rank zero's checkpoint."""
    save = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fits(rank, [DataLoader(Stream(rank), batch_size=None)], [*pair(on_error="raise"), save], enable_checkpointing=True)
    callbacks = pair(on_error="raise")
    run = trainer(callbacks, accelerator=ACCELERATOR, devices=2, strategy="ddp")
    module = Classifier(mlp())
    run.fit(module, DataLoader(Stream(rank), batch_size=None), ckpt_path=directory / "step=1.ckpt")
    found = [record.to_dict() for callback in callbacks for record in callback.records]
    return {"records": found, "state": {name: tensor.clone() for name, tensor in module.net.state_dict().items()}}


def piece(rank: int) -> TensorDataset:
    inputs, labels = data(0, UNEVEN)
    return TensorDataset(*((inputs[:7], labels[:7]) if rank == 0 else (inputs[7:], labels[7:])))


def pieces(rank: int, directory: Path) -> Any:
    """Each rank has a dataset of its own."""
    loaders = [DataLoader(piece(rank), batch_size=2, shuffle=True)]
    settings = {"use_distributed_sampler": False, "limit_train_batches": 2}
    few = FeatureRankMonitor(probe_samples=6, name="few", on_error="raise")
    return both(rank, lambda: loaders, [*pair(on_error="raise"), few], **settings)


def held_out(rank: int, directory: Path) -> Any:
    """A user's sampler leaves samples out; DDP wraps it."""
    sampler = torch.utils.data.SubsetRandomSampler(range(6))
    found = FeatureRankMonitor(when="start", on_error="raise")
    return fits(rank, [DataLoader(dataset(), batch_size=2, sampler=sampler)], [found])


class FailsOn(Classifier):
    """Cannot be measured on one rank; trains as ever."""

    bad = 1

    def curvature_loss(self, batch: Any) -> Any:
        if self.trainer.global_rank == self.bad:
            raise RuntimeError("no memory left")
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class FailsOnZero(FailsOn):
    bad = 0


def failing(kind: type[FailsOn], rank: int, directory: Path) -> Any:
    return both(rank, lambda: [whole_loader(0)], pair(), lambda: kind(mlp(), lr=0.02))


def no_data(rank: int, directory: Path) -> Any:
    def get(trainer: L.Trainer, module: L.LightningModule) -> Any:
        if trainer.global_rank == 1:
            raise OSError("disk gone")
        return data(0, 8)

    return both(rank, lambda: [whole_loader(0)], pair(data=get))


def unsendable(rank: int, directory: Path) -> Any:
    """Probe data that differ and cannot be pickled on one rank."""

    def get(trainer: L.Trainer, module: L.LightningModule) -> Any:
        inputs, labels = data(trainer.global_rank, 8)
        return [inputs, labels] if trainer.global_rank == 0 else [inputs, labels, Locked()]

    return both(rank, lambda: [whole_loader(0)], pair(data=get))


class Locked:
    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle Locked")

    def __deepcopy__(self, memo: Any) -> Locked:
        return self


class Gathers(Classifier):
    """A step with a collective of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.net(batch[0])
        everybody = self.all_gather(out.detach())
        return nn.functional.cross_entropy(out, batch[1]) + 0.0 * everybody.sum()


def collective(rank: int, directory: Path) -> Any:
    loader = DataLoader(TensorDataset(*data(0, 12)), batch_size=3)
    return both(rank, lambda: [loader], pair(), lambda: Gathers(mlp(), lr=0.02))


class Reduces(Classifier):
    """Collectives that are no attributes of ``torch.distributed``: an imported name, a functional one."""

    def __init__(self, how: str) -> None:
        super().__init__(mlp(), lr=0.02)
        self.how = how

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.net(batch[0])
        total = out.detach().sum()
        if self.how == "name":
            all_reduce(total)
        else:
            total = _functional_collectives.all_reduce(total, "sum", torch.distributed.group.WORLD) + 0.0
        return nn.functional.cross_entropy(out, batch[1]) + 0.0 * total


def collective_by_name(rank: int, directory: Path) -> Any:
    """Each step in both forms; training itself goes on with them."""
    found = {}
    for how in ("name", "functional"):
        loader = DataLoader(TensorDataset(*data(0, 12)), batch_size=3)
        ran = fits(rank, [loader], pair(when="start"), partial(Reduces, how), max_steps=1)
        found[how] = [record["failure"] for record in ran["records"]]
    return found


class Slow(Classifier):
    """Slow on one rank, so that timed trials come out differently there."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.03 * self.trainer.global_rank)
        return super().training_step(batch, batch_idx)


def budget(rank: int, directory: Path) -> Any:
    wide = nn.Sequential(nn.Linear(16, 150), nn.ReLU(), nn.Linear(150, 150), nn.ReLU(), nn.Linear(150, 3))
    monitor = HessianSpectrumMonitor("hessian", when="start", max_seconds=0.2, on_error="raise")
    loaders = [DataLoader(TensorDataset(*data(task, 256)), batch_size=128) for task in (0, 1)]
    found = fits(rank, loaders, [monitor], lambda: Slow(wide, lr=0.01))
    return {"records": found["records"], "plans": monitor.state_dict()["plans"]}


def stopping(rank: int, directory: Path) -> Any:
    """Callbacks that read our keys, on both ranks."""
    stop = EarlyStopping("plasticity/features/effective_rank", patience=1, mode="max", min_delta=100.0)
    save = ModelCheckpoint(directory, monitor="plasticity/ggn/eps_rank_0.01", save_top_k=1, mode="max")
    callbacks = [TaskTracker(EveryNEpochs(1)), *pair(on_error="raise"), stop, save]
    options = {"max_epochs": 6, "enable_checkpointing": True}
    found = fits(rank, [whole_loader(0)], callbacks, **options)
    return found | {"stopped": stop.stopped_epoch, "best": save.best_model_path, "score": float(save.best_model_score)}


class Labelled(Classifier):
    """Learns of a new task from its batches; one rank is a batch late, the other way round on the next task."""

    task_id = 0

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.training:
            seen = len(self.losses)
            self.task_id = (seen + self.trainer.global_rank) // 2
        return batch


def labels(rank: int, directory: Path) -> Any:
    loader = DataLoader(TensorDataset(*data(0, 24)), batch_size=3)
    monitor = FeatureRankMonitor(on_error="raise")
    tracker = TaskTracker(TaskAttribute())
    return fits(rank, [loader], [tracker, monitor], lambda: Labelled(mlp(), lr=0.02))


# Regularisation: a batch of six in one process, or of three in two.


def regularised(kind: str, batch_size: int, rank: int, directory: Path, **settings: Any) -> Any:
    inputs, classes = data(3, 24)
    samples = TensorDataset(inputs[:, :4], classes)
    # Lightning's own sampler would shuffle.
    dealt = DistributedSampler(samples, num_replicas=6 // batch_size, rank=rank, shuffle=False)
    loader = DataLoader(samples, batch_size=batch_size, sampler=dealt)
    callbacks = []
    if kind == "callback":
        callbacks = [Regularization.l2er(rank_strength=0.3, rank_every_n_steps=2, l2_strength=1e-2)]
    return fits(rank, [loader], callbacks, MixedNet if kind == "mixin" else Net, **BY_HAND, **settings)


class MixedNet(L2ERMixin, Net):
    rank_strength, rank_every_n_steps, l2_strength = 0.3, 2, 1e-2


class OnlyRankSteps(L2ERMixin, Net):
    """Moved by the separate steps alone."""

    rank_strength, rank_every_n_steps, l2_strength = 0.3, 1, 0.0

    def loss(self, batch: Any) -> Any:
        return super().loss(batch[:2])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def minibatches(rank: int) -> list[Any]:
    return [(inputs[:, :4], labels) for inputs, labels in Stream(rank)]


def uneven_steps(rank: int, directory: Path, alone: bool = False, **settings: Any) -> Any:
    own = minibatches(rank)
    if alone:
        pairs = zip(minibatches(0), minibatches(1), strict=True)
        own = [tuple(torch.cat(parts) for parts in zip(*pair, strict=True)) for pair in pairs]
    return fits(rank, [DataLoader(own, batch_size=None)], [], OnlyRankSteps, **BY_HAND, **settings)


def locked_steps(rank: int, directory: Path) -> Any:
    """Minibatches that cannot be sent."""
    own = [(*batch, Locked()) for batch in minibatches(rank)]
    torch.manual_seed(0)
    module = OnlyRankSteps()
    trainer(devices=2, strategy="ddp", **BY_HAND).fit(module, DataLoader(own, batch_size=None))
    moved = [float((a - b).abs().max()) for a, b in zip(module.parameters(), Net().parameters(), strict=True)]
    return {"weights": {name: p.detach() for name, p in module.named_parameters()}, "moved": max(moved)}


BY_HAND = {"use_distributed_sampler": False}


PENALTIES: dict[str, Any] = {
    "l2_init": lambda: L2Init(0.3),
    "spectral": lambda: SpectralNorm(0.1),
    "wasserstein": lambda: Wasserstein(0.3),
}


def penalised(batch_size: int, rank: int, directory: Path, **settings: Any) -> Any:
    """Each penalty on the weights, and none, on every other sample (or on all)."""
    inputs, classes = data(3, 24)
    samples = TensorDataset(inputs[:, :4], classes)
    dealt = DistributedSampler(samples, num_replicas=6 // batch_size, rank=rank, shuffle=False)
    loader = DataLoader(samples, batch_size=batch_size, sampler=dealt)
    plain = fits(rank, [loader], [], Net, **BY_HAND, **settings)
    found = {"plain": plain}
    for name, make in PENALTIES.items():
        found[name] = fits(rank, [loader], [Regularization([make()])], Net, **BY_HAND, **settings)
    return found


def probing(rank: int, directory: Path, **settings: Any) -> Any:
    """Two tasks with a probe at each; twice, for what it may disturb."""
    probe = TrainabilityProbe(12, seeds=2, batch_size=4, evaluate_every=3, max_seconds=None, on_error="raise")
    return both(rank, lambda: [whole_loader(0), whole_loader(1)], [probe], **settings)


REMEDIES: dict[str, Any] = {
    "cbp": lambda: ContinualBackprop(0.3, maturity=1, decay=0.9, utility="adaptable"),
    "redo": lambda: ReDo(0.6, every_n_steps=2, samples=1),
    "shrink": lambda: ShrinkAndPerturb(0.9, 0.05),
    "reset": lambda: LayerReset(2),
    "rigl": lambda: SparseTopology(0.4, method="rigl", every_n_steps=2),
}


def remedied(batch_size: int, rank: int, directory: Path, **settings: Any) -> Any:
    """Each intervention on every other sample (or on all), in two tasks, and how many units it has reset."""
    inputs, classes = data(3, 24)
    samples = TensorDataset(inputs[:, :4], classes)
    dealt = DistributedSampler(samples, num_replicas=6 // batch_size, rank=rank, shuffle=False)
    loader = DataLoader(samples, batch_size=batch_size, sampler=dealt)
    found = {}
    for name, make in REMEDIES.items():
        callback = make()
        tasks = [TaskTracker(EveryNEpochs(1)), callback]
        made = partial(Net, "adam")
        found[name] = fits(rank, [loader], tasks, made, use_distributed_sampler=False, max_epochs=2, **settings)
        engine = callback.state_dict().get("engine", {})
        layers = engine.get("layers", {})
        found[name]["num_reset"] = engine.get("num_reset") or {k: own["num_reset"] for k, own in layers.items()}
    return found


def metrics(rank: int | None, directory: Path) -> Any:
    """Every metric on this rank's share of the features, or on all; torchmetrics adds up the ranks' states."""
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(5)) @ torch.diag(torch.arange(5.0))
    shares = {None: features, 0: features[:9], 1: features[9:]}
    found = {}
    for name, make in METRICS.items():
        metric = make()
        for batch in shares[rank].split(4):
            metric.update(batch)
        found[name] = float(metric.compute())
        starved = make(num_features=5)  # one rank sees nothing
        if rank != 1:
            starved.update(features)
        found[f"{name}, one rank without samples"] = float(starved.compute())
    return found


# Weights in pieces


class Sharded(Classifier):
    """``fully_shard`` on every layer and on the whole."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if self.device_mesh is None or hasattr(self.net, "unshard"):
            return
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class TensorParallel(Classifier):
    """Two layers cut along their features."""

    def configure_model(self) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        if self.device_mesh is not None and not hasattr(self.net[0].weight, "full_tensor"):
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)


def sharded_run(callbacks: Sequence[Any], kind: type[Classifier] = Sharded) -> dict[str, Any]:
    torch.manual_seed(0)
    module = kind(mlp(), lr=0.02)
    sizes = (2, 1) if kind is Sharded else (1, 2)
    run = trainer(callbacks, devices=2, strategy=ModelParallelStrategy(*sizes))
    run.fit(module, DataLoader(dataset(), batch_size=4))
    state = dict(module.net.state_dict())
    mine = {name: tensor.to_local() if hasattr(tensor, "to_local") else tensor for name, tensor in state.items()}
    return {
        "mine": leaves(mine),
        "losses": repr(module.losses),
        "rng": leaves(torch.get_rng_state()),
        "state": {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()},
        "records": [r.to_dict() for c in callbacks for r in getattr(c, "records", [])],
        "pieces": {name: tuple(tensor.shape) for name, tensor in mine.items()},
    }


def in_pieces(kind: type[Classifier], rank: int, directory: Path) -> Any:
    plain, watched = sharded_run([], kind), sharded_run(pair(on_error="raise"), kind)
    return watched | {"differs": [key for key in ("mine", "losses", "rng") if plain[key] != watched[key]]}


def refused(rank: int, directory: Path) -> Any:
    """A separate step cannot be taken on pieces; L2 and a penalty in the loss can."""
    from lightning_plasticity import L2
    from lightning_plasticity import EffectiveRank as Penalty

    try:
        sharded_run([Regularization.l2er()])
    except ValueError as error:
        said = str(error)
    trained = sharded_run([Regularization([Penalty(0.3, mode="loss", every_n_steps=1), L2(1e-2)])])
    return {"said": said, "losses": trained["losses"], "plain": sharded_run([])["losses"]}


DDP = {
    "map_style": map_style,
    "stream": stream,
    "resumed": resumed,
    "pieces": pieces,
    "held_out": held_out,
    "fails on 1": partial(failing, FailsOn),
    "fails on 0": partial(failing, FailsOnZero),
    "no_data": no_data,
    "unsendable": unsendable,
    "collective": collective,
    "collective_by_name": collective_by_name,
    "budget": budget,
    "stopping": stopping,
    "labels": labels,
    "mixin": partial(regularised, "mixin", 3),
    "callback": partial(regularised, "callback", 3),
    "unregularised": partial(regularised, "none", 3),
    "remedied": partial(remedied, 3),
    "penalised": partial(penalised, 3),
    "probing": probing,
    "uneven_steps": uneven_steps,
    "locked_steps": locked_steps,
    "metrics": metrics,
}
SHARDED = {
    "fully sharded": partial(in_pieces, Sharded),
    "tensor parallel": partial(in_pieces, TensorParallel),
    "refused": refused,
}
ALONE = {"devices": 1, "strategy": "auto"}
ONE = {
    "mixin": partial(regularised, "mixin", 6, **ALONE),
    "callback": partial(regularised, "callback", 6, **ALONE),
    "unregularised": partial(regularised, "none", 6, **ALONE),
    "remedied": partial(remedied, 6, **ALONE),
    "penalised": partial(penalised, 6, **ALONE),
    "probing": partial(probing, **ALONE),
    "uneven_steps": partial(uneven_steps, alone=True, **ALONE),
    "metrics": lambda rank, directory: metrics(None, directory),
}
