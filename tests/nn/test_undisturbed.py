"""``undisturbed``: after running, differentiating or failing inside, everything is bit for bit as it was."""

from __future__ import annotations

import itertools
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from states import bits, changed, state
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_plasticity.nn import is_measuring, preserve_rng, undisturbed
from lightning_plasticity.nn.snapshot import MANY, SMALL, Snapshot


class Everything(L.LightningModule):
    """A training step that writes wherever a module can write."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
        self.target = nn.Linear(4, 6)
        self.metric = MulticlassAccuracy(num_classes=3)
        self.mean = MeanMetric()
        self.register_buffer("running", torch.tensor([0.0, -0.0, float("nan")]))
        self.register_buffer("replaced", torch.ones(2))
        self.plain = torch.ones(3)
        self.array = np.zeros(3)
        self.list: list[Any] = [1, [2, 3]]
        self.dict: dict[str, Any] = {"a": [1], "b": {"c": 2}}
        self.ordered = OrderedDict(x=1)
        self.default: defaultdict[str, int] = defaultdict(int)
        self.set = {1, 2}
        self.deque = deque([torch.zeros(2)], maxlen=3)
        self.tuple = ([1], torch.zeros(1))
        self.outside = [nn.Linear(2, 2)]  # hidden from named_modules on purpose
        self.generator = torch.Generator().manual_seed(3)
        self.numpy_generator = np.random.default_rng(3)
        self.python_generator = random.Random(3)
        self.counter = 0
        self.carried: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self.body(x + torch.randn(4, generator=self.generator))
        loss = F.cross_entropy(out, y) + random.random() + np.random.rand()
        with torch.no_grad():
            for ours, theirs in zip(self.body[0].parameters(), self.target.parameters(), strict=True):
                theirs.data.mul_(0.9).add_(ours.data)
            self.target.weight.data = self.target.weight.data * 2
            self.body[0].bias.add_(1.0)
            self.outside[0].weight.zero_()
        self.running.neg_()
        self.running[0] = 5.0
        self.running.data = torch.zeros(4)
        self.replaced = torch.zeros(7)
        self.plain += 1
        self.array += 1
        self.list.append(out)
        self.list[1].clear()
        self.dict["a"].append(2)
        self.dict["b"]["c"] = 3
        self.dict["new"] = loss
        self.ordered.pop("x")
        self.default["k"] += 1
        self.set.add(9)
        self.deque[0].add_(1)
        self.deque.append(loss)
        self.tuple[0].append(3)
        self.tuple[1].add_(1)
        self.counter += 1
        self.carried = out
        self.added = out
        self.numpy_generator.random()
        self.python_generator.random()
        self.metric(out, y)
        self.mean.update(loss.detach())
        self.log("loss", loss)
        self.log_dict({"a": loss, "accuracy": self.metric})
        self.body[3].weight.requires_grad_(False)
        self.body.eval()
        self.handle = self.body.register_forward_hook(lambda *args: None)
        (self.body[0].weight.sum() * 2).backward()  # a raw backward: nothing can catch it, so .grad is put back
        self.body[0].bias.grad = None
        self.zero_grad()
        return loss


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 4, generator=generator), torch.arange(size) % 3


def with_gradients(module: nn.Module) -> nn.Module:
    for index, parameter in enumerate(module.parameters()):
        if index % 2:
            parameter.grad = torch.full_like(parameter, float(index))
    return module


@pytest.fixture
def module() -> Everything:
    torch.manual_seed(0)
    found = Everything()
    with_gradients(found)
    found.body[3].eval()
    return found


def step_and_grad(module: L.LightningModule) -> Tensor:
    loss = module.training_step(batch(), 0)
    torch.autograd.grad(loss, [p for p in module.body.parameters() if p.requires_grad], allow_unused=True)
    return loss


def test_the_step_alone_does_change_nearly_everything(module: Everything) -> None:
    module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    before = state(module)
    step_and_grad(module)
    assert len(changed(before, state(module))) > 40


@pytest.mark.parametrize("mode", ["frozen", "as_is", "eval"])
def test_everything_is_as_it_was(module: Everything, mode: Any) -> None:
    before = state(module)
    with undisturbed(module, mode=mode):
        step_and_grad(module)
        assert is_measuring()
    assert changed(before, state(module)) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_everything_is_as_it_was_after_an_error(module: Everything, error: type[BaseException]) -> None:
    before = state(module)
    with pytest.raises(error), undisturbed(module):  # noqa: PT012
        step_and_grad(module)
        raise error("inside")
    assert changed(before, state(module)) == []


@contextmanager
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@contextmanager
def _autocast() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@pytest.mark.parametrize("outside", [torch.inference_mode, _no_grad, _autocast])
def test_gradients_in_full_precision_whatever_is_outside(module: Everything, outside: Callable[[], Any]) -> None:
    with outside():
        before = state(module)
        with undisturbed(module):
            assert step_and_grad(module).dtype == torch.float32
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
            x = torch.ones(2, requires_grad=True)
            assert (x * x).sum().requires_grad
        assert changed(before, state(module)) == []


def test_nested(module: Everything) -> None:
    before = state(module)
    with undisturbed(module):
        inside = state(module)
        with undisturbed(module, mode="eval"):
            step_and_grad(module)
        assert changed(inside, state(module)) == []
        assert is_measuring()
        step_and_grad(module)
    assert changed(before, state(module)) == []


def test_a_module_under_two_names() -> None:
    shared = nn.Linear(3, 3)
    module = with_gradients(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.BatchNorm1d(3))}))
    before = state(module)
    with undisturbed(module, mode="as_is"):
        loss = module["b"](module["a"](torch.randn(4, 3))).sum()
        torch.autograd.grad(loss, list(module.parameters()))
        shared.weight.data.zero_()
    assert changed(before, state(module)) == []
    assert module["a"] is module["b"][0]


def test_nan_and_signed_zero_parameters_are_restored_bit_exact() -> None:
    module = nn.Linear(2, 2)
    payload = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000, 0], dtype=torch.int32).view(torch.float32)
    module.weight.data = payload.reshape(2, 2).clone()
    before = bits(module.weight)
    with undisturbed(module), torch.no_grad():
        module.weight.zero_()
    assert bits(module.weight) == before
    module.bias.data = torch.tensor([0.0, -0.0])
    before = bits(module.bias)
    with undisturbed(module), torch.no_grad():
        module.bias.neg_()  # equal to what it was, but for the signs
    assert bits(module.bias) == before


def test_moved_parameters_of_another_type_shape_and_stride() -> None:
    module = with_gradients(nn.Linear(3, 3))
    before = state(module)
    with undisturbed(module):
        module.weight.data = module.weight.data.t()
        module.double()
    with undisturbed(module), torch.no_grad():
        module.weight.data = module.weight.data.t()  # the same memory, read otherwise
    assert changed(before, state(module)) == []
    assert module.weight.is_contiguous()


def test_sparse_gradients() -> None:
    module = nn.Embedding(5, 2, sparse=True)
    module(torch.tensor([1, 3])).sum().backward()
    gradient, dense = module.weight.grad, module.weight.grad.to_dense()  # type: ignore[union-attr]
    with undisturbed(module):
        module(torch.tensor([0, 1])).sum().backward()
    assert module.weight.grad is gradient
    assert gradient is not None
    assert torch.equal(gradient.to_dense(), dense)


def test_in_place_changes_can_still_be_differentiated() -> None:
    """The restored value must not look changed to a graph that was built before."""
    module = nn.BatchNorm1d(2)
    weight = module.weight * 1
    loss = (weight * module.running_mean).sum()
    with undisturbed(module, mode="as_is"):
        module(torch.randn(4, 2))
    loss.backward()
    assert module.weight.grad is not None
    assert torch.equal(module.weight.grad, module.running_mean)


@pytest.mark.parametrize(("mode", "training", "norm", "dropout"), [
    ("frozen", True, False, False), ("as_is", True, True, True), ("eval", False, False, False),
])  # fmt: skip
def test_modes(mode: Any, training: bool, norm: bool, dropout: bool) -> None:
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4), nn.LSTM(4, 4, 2, dropout=0.5))
    with undisturbed(module, mode=mode):
        assert [module.training, module[0].training, module[1].training] == [training, norm, dropout]
        assert module[3].dropout == (0.0 if mode == "frozen" else 0.5)
    assert module[3].dropout == 0.5


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mode='train', expected one of \('frozen', 'as_is', 'eval'\)"):
        undisturbed(nn.Linear(1, 1), mode="train").__enter__()  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_draws() -> None:
    module = nn.Dropout(0.5)

    def draws(seed: int) -> tuple[bytes, float, float]:
        with undisturbed(module, mode="as_is", seed=seed):
            return bits(module(torch.ones(50))), random.random(), np.random.rand()

    first = draws(1)
    torch.rand(3), random.random(), np.random.rand()
    assert draws(1) == first
    assert draws(2) != first


def test_attention_can_be_differentiated_twice() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with undisturbed(layer):
        loss = F.scaled_dot_product_attention(*(layer(torch.randn(2, 3, 8)),) * 3).square().sum()
        (gradient,) = torch.autograd.grad(loss, [layer.linear1.weight], create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), [layer.linear1.weight])
    assert second.abs().sum() > 0


class Meter:
    """A plain helper object, as people put on their modules."""

    def __init__(self) -> None:
        self.total = 0.0
        self.rng = np.random.default_rng(1)
        self.seen: list[Any] = [[1]]
        self.memory = np.zeros(3)
        self.state = SimpleNamespace(weight=torch.zeros(2), owner=self)
        self.history = History([1])
        self.draw = partial(np.random.default_rng(2).random, 2)

    def __call__(self) -> None:
        self.total += float(self.rng.random() + self.draw().sum())
        self.seen.append(2)
        self.seen[0].append(3)
        self.memory += 1
        self.history.count += 1
        self.history.append(self)
        self.state.weight.add_(1)
        self.state.added = [self]

    def contents(self) -> list[Any]:
        values = [self.total, self.seen, self.memory.tolist(), self.state.weight.tolist(), sorted(vars(self.state))]
        values += [list(self.history), self.history.count]
        return deepcopy([*values, self.rng.bit_generator.state, self.draw.func.__self__.bit_generator.state])  # type: ignore[attr-defined]


class History(list[Any]):
    """A list with an attribute."""

    count = 0


class Chained:
    def __init__(self, following: Any) -> None:
        self.following = following


class Served(Dataset[Any]):
    """Looks like a helper, but holds the data."""

    def __init__(self) -> None:
        self.x, self.array = torch.zeros(SMALL + 1, dtype=torch.uint8), np.zeros(SMALL)
        self.parts = [self.x[:], [self.x[:]]]


def test_plain_helper_objects_are_as_they_were() -> None:
    module = nn.Linear(2, 2)
    module.meter = meter = Meter()

    def closure(again: bool = True) -> None:
        meter()
        if again:
            closure(False)  # a function that holds itself

    module.closure = closure
    module.hidden = [Chained(inner := Meter())]
    for _ in range(5000):
        module.hidden[0] = Chained(module.hidden[0])
    parts, before = (meter.seen, meter.state, meter.memory), [meter.contents(), inner.contents()]
    with undisturbed(module):
        module.closure()
        module.meter()
        inner()
        module.meter = None
    assert [meter.contents(), inner.contents()] == before
    assert module.meter is meter
    assert all(now is then for now, then in zip((meter.seen, meter.state, meter.memory), parts, strict=True))


def test_datasets_loggers_trainers_and_long_lists_are_not_copied() -> None:
    module, trainer = L.LightningModule(), L.Trainer(logger=False, accelerator="cpu")
    module.data, module.source = Served(), DataLoader(TensorDataset(torch.zeros(3)))
    module.trainer = trainer
    module.long = [torch.zeros(1) for _ in range(MANY + 1)]
    snapshot = Snapshot(module)
    assert not {id(module.source), id(trainer)} & snapshot._objects.keys()
    assert snapshot._tensors == snapshot._arrays == {}
    module.long.pop()
    module.data.parts.pop()
    module.data.x = None
    snapshot.restore()
    assert len(module.long) == MANY + 1
    assert len(module.data.parts) == 2
    assert module.data.x is not None


class SummaryWriter:
    """Stands in for TensorBoard's, which is known by this name."""

    def __init__(self) -> None:
        self.written: list[Any] = []

    def add_scalar(self, name: str, value: float) -> None:
        self.written.append((name, value))


def test_writers_kept_on_the_module_write_nothing() -> None:
    module = nn.Linear(2, 2)
    module.writers = {"board": [SummaryWriter()]}
    # As the real one is no plain object of the user's, what it has written is not put back: it must not be called.
    (writer,) = module.writers["board"]
    outside: list[Any] = []
    type(writer).__module__, writer.written = "tensorboardX.writer", outside
    with undisturbed(module):
        module.writers["board"][0].add_scalar("a", 1.0)
        assert outside == []
    writer.add_scalar("b", 1.0)
    assert outside == [("b", 1.0)]


def test_iterators_are_not_drawn_from() -> None:
    module = nn.Linear(2, 2)
    generator = (i for i in range(3))
    module.pair, module.count = (iter([1, 2]), generator), itertools.count(0.5)
    module.both = [itertools.cycle(iter([1, 2])), itertools.cycle(generator)]
    before = (module.pair, module.count, list(module.both))
    next(module.pair[0])
    with undisturbed(module):
        assert next(module.pair[0]) == 2
        assert next(module.both[0]) == 1
        for held in (module.pair[1], module.count, module.both[1]):
            with pytest.raises(RuntimeError, match="an iterator that cannot be put back"):
                next(held)
    assert (module.pair, module.count, module.both) == before
    assert [next(module.pair[0]), next(module.count), next(module.both[0]), next(generator)] == [2, 0.5, 1, 0]


def test_the_state_of_optimizers_is_copied_only_when_it_can_be_reached() -> None:
    class Reaches(L.LightningModule):
        def optimizers(self, use_pl_optimizer: bool = True) -> Any:
            return optimizer

    module = Reaches()
    module.net = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module.net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    before = str(optimizer.state_dict())
    with undisturbed(module, optimizers=[optimizer]):
        module.optimizers().state[module.net.weight]["exp_avg"].add_(1)
        module.optimizers().state.clear()
    assert str(optimizer.state_dict()) == before


def test_settings_of_optimizers_and_schedulers_are_put_back() -> None:
    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    second = torch.optim.Adam(module.parameters(), lr=torch.tensor(0.1))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    optimizer.step()
    groups, before = optimizer.param_groups, str((optimizer.state_dict(), second.state_dict(), scheduler.state_dict()))
    with undisturbed(module, optimizers=[optimizer, second], schedulers=[scheduler]):
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
        second.param_groups[0]["lr"].mul_(0.5)
        scheduler.step()
        scheduler.last_epoch = 7
        scheduler.base_lrs[0] = 3.0
    assert str((optimizer.state_dict(), second.state_dict(), scheduler.state_dict())) == before
    assert optimizer.param_groups is groups
    assert optimizer.param_groups[0]["params"][0] is module.weight


def test_lightning_log_is_silent_inside_and_back_after() -> None:
    module = L.LightningModule()
    with undisturbed(module):
        module.log("a", 1.0)
        module.log_dict({"b": 2.0})
        module.clip_gradients(None)  # type: ignore[arg-type]
    assert not {"log", "log_dict", "clip_gradients", "manual_backward"} & set(module.__dict__)


def test_manual_optimization_collects_and_does_not_step() -> None:
    module = with_gradients(nn.Linear(2, 1))
    module.__class__ = type("Manual", (nn.Linear,), {"manual_backward": lambda self, loss: loss.backward()})
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    methods = [optimizer.__dict__.get("step"), optimizer.__dict__.get("zero_grad"), scheduler.__dict__.get("step")]
    before, moments, rates = state(module), str(optimizer.state_dict()), scheduler.state_dict()
    with undisturbed(module, optimizers=[optimizer], schedulers=[scheduler, plateau]) as collected:
        for factor in (1, 2):
            optimizer.zero_grad()
            module.manual_backward(module(torch.ones(1, 2)).sum() * factor)
            optimizer.step()

        def closure() -> Tensor:
            loss = module(torch.ones(1, 2)).sum() * 3
            module.manual_backward(loss)
            return loss

        assert optimizer.step(closure) is not None
        scheduler.step()
        plateau.step(1.0)
        values = [float(loss.detach()) for loss in collected]
        assert values == pytest.approx([values[0], 2 * values[0], 3 * values[0]])
        torch.autograd.grad(torch.stack(collected).sum(), list(module.parameters()))
    assert changed(before, state(module)) == []
    assert str(optimizer.state_dict()) == moments
    assert scheduler.state_dict() == rates
    assert plateau.num_bad_epochs == 0
    assert methods == [
        optimizer.__dict__.get("step"),
        optimizer.__dict__.get("zero_grad"),
        scheduler.__dict__.get("step"),
    ]


def test_methods_shadowed_before_an_error_are_restored() -> None:
    module = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(AttributeError):
        undisturbed(module, optimizers=[optimizer, object()]).__enter__()
    assert not optimizer.__dict__.keys() & {"step", "zero_grad"}
    assert not is_measuring()


def test_preserve_rng_also_after_an_error() -> None:
    before = (bits(torch.get_rng_state()), random.getstate(), str(np.random.get_state()))
    with pytest.raises(ZeroDivisionError), preserve_rng():
        random.random(), np.random.rand(), torch.rand(1), 1 / 0
    assert before == (bits(torch.get_rng_state()), random.getstate(), str(np.random.get_state()))
