"""Whole fits with ``SparseTopology``: masks over fits and checkpoints, beside monitors and penalties; logging."""

from __future__ import annotations

import csv
import math
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from small_fits import BATCHES, Net, data, fit, trainer, weights
from states import bits

from lightning_plasticity import (
    FeatureRankMonitor,
    HessianSpectrumMonitor,
    L2Init,
    Regularization,
    ShrinkAndPerturb,
    SparseTopology,
    SpectralNorm,
    TrainabilityProbe,
    Wasserstein,
)
from lightning_plasticity.nn.masked_layers import masked_layers, masks_of, stored
from lightning_plasticity.nn.masks import find_masks
from lightning_plasticity.sparsity import sparsify

SIZES = {"net.0": 32, "net.2": 56, "net.4": 21}


def masks(module: torch.nn.Module) -> bytes:
    return b"".join(bits(mask) for mask in find_masks(module).values())


def counts(module: torch.nn.Module) -> int:
    return sum(int(mask.sum()) for mask in find_masks(module).values())


def clean(module: torch.nn.Module) -> bool:
    """Nothing is stored where the mask is off."""
    return all(
        bool((stored(layer)[~masks_of(layer)["weight"].mask] == 0).all()) for layer in masked_layers(module).values()
    )


def dynamic(method: Any, **settings: Any) -> SparseTopology:
    return SparseTopology(**({"density": 0.4, "method": method, "every_n_steps": 2} | settings))


def test_the_masks_are_those_of_sparsify_and_stay_over_fits() -> None:
    by_hand, net = Net("adam"), Net("adam")
    sparsify(by_hand, 0.4, seed=3)
    callback = SparseTopology(0.4, seed=3)
    fit(net, callbacks=[callback])
    before = masks(net)
    assert before == masks(by_hand)
    fit(net, callbacks=[callback])
    fit(by_hand, callbacks=[SparseTopology(0.4)])  # keeps masks that are there
    assert masks(net) == masks(by_hand) == before
    with pytest.raises(ValueError, match=r"density=0\.5\) found masks with 44 of 109 .*net\.4, expected 54"):
        fit(net, callbacks=[SparseTopology(0.5)])


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_training_moves_masks_at_one_density_and_keeps_the_rest_zero(method: Any) -> None:
    # An odd number of updates in the second fit: with so short a period RigL drops what it has just grown, and may
    # be back where it was after an even one.
    net, callback = Net("adam"), dynamic(method, every_n_steps=3)
    fit(net, callbacks=[callback])
    first = masks(net)
    assert counts(net) == round(0.4 * 109)
    fit(net, callbacks=[callback])
    assert masks(net) != first
    assert counts(net) == round(0.4 * 109)
    assert clean(net)
    assert callback.state_dict()["engine"]["num_steps"] == 2 * BATCHES


@pytest.mark.parametrize("method", ["static", "set", "rigl"])
def test_penalties_and_noise_do_not_reach_masked_entries(method: Any) -> None:
    net = Net("adam", weight_decay=1e-2)
    penalties = Regularization([L2Init(0.1), Wasserstein(0.1), SpectralNorm(0.1)])
    noise = ShrinkAndPerturb(0.99, 0.01, when="step")
    fit(net, callbacks=[dynamic(method), penalties, noise], max_epochs=2)
    assert clean(net)


def test_monitors_and_probes_beside_it_change_nothing() -> None:
    outcomes = []
    for monitors in (
        [],
        [
            HessianSpectrumMonitor(probe_samples=12, on_error="raise"),
            FeatureRankMonitor(probe_samples=12, fresh_control=True, on_error="raise"),
            TrainabilityProbe(num_steps=3, on_error="raise"),
        ],
    ):
        net = Net("adam")
        fit(net, callbacks=[*monitors, dynamic("rigl")], max_epochs=2)
        outcomes.append((bits(weights(net)), masks(net)))
    assert outcomes[0] == outcomes[1]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_checkpoint_is_tested_with_the_callback(tmp_path: Path) -> None:
    class Tested(Net):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.loss(batch))

    net, saver = Tested("adam"), ModelCheckpoint(tmp_path, filename="end")
    fit(net, callbacks=[dynamic("rigl"), saver], enable_checkpointing=True)
    other = Tested("adam")
    run = trainer(callbacks=[dynamic("rigl"), saver], enable_checkpointing=True)
    run.test(other, data(), ckpt_path=str(tmp_path / "end.ckpt"), verbose=False)
    assert (masks(other), bits(weights(other))) == (masks(net), bits(weights(net)))
    plain = Tested("adam")
    trainer(callbacks=[dynamic("rigl")]).test(plain, data(), verbose=False)
    assert not find_masks(plain)  # nothing was asked for


def test_a_module_is_pickled_between_fits_as_studies_do() -> None:
    outcomes = []
    for between in (lambda pair: pair, lambda pair: pickle.loads(pickle.dumps(pair))):
        net, callback = Net("adam"), dynamic("rigl")
        for _ in range(2):
            net._trainer = None
            net, callback = between((net, callback))
            fit(net, callbacks=[callback])
        outcomes.append((bits(weights(net)), masks(net)))
    assert outcomes[0] == outcomes[1]


def test_what_is_logged(tmp_path: Path) -> None:
    fit(Net("adam"), callbacks=[dynamic("rigl")], logger=CSVLogger(tmp_path, name="", version=""))
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    density = {key: float(rows[0][key]) for key in rows[0] if key.startswith("plasticity/sparsity/density")}
    assert density.pop("plasticity/sparsity/density") == round(0.4 * 109) / 109
    assert sum(density[f"plasticity/sparsity/density/{name}"] * size for name, size in SIZES.items()) == pytest.approx(
        44
    )
    key = "plasticity/sparsity/exchanged"
    exchanged = {int(row["step"]): float(row[key]) for row in rows if row.get(key)}
    expected = sum(math.floor(0.3 * round(density[f"plasticity/sparsity/density/{n}"] * s)) for n, s in SIZES.items())
    assert exchanged == dict.fromkeys([2, 4, 6, 8], float(expected))
    assert all(f"{key}/{name}" in rows[-1] for name in SIZES)


@pytest.mark.parametrize(("method", "delay"), [("set", 0), ("rigl", 1)])
def test_on_demand_it_acts_once(method: Any, delay: int) -> None:
    class Demand(L.Callback):
        def __init__(self) -> None:
            self.seen: list[bytes] = []

        def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index == 3:
                callback.intervene(run, module)
            self.seen.append(masks(module))

    callback, demand = dynamic(method, every_n_steps=100), Demand()
    fit(Net("adam"), callbacks=[callback, demand])
    changes = [i for i in range(1, BATCHES) if demand.seen[i] != demand.seen[i - 1]]
    assert changes == [3 + delay]
    with pytest.raises(RuntimeError, match="cannot update masks now"):
        SparseTopology().intervene(trainer(), Net())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"density": 0}, r"density=0, expected a number in \(0, 1\]"),
        ({"method": "er"}, "method='er', expected one of"),
        ({"distribution": "er"}, "distribution='er', expected one of"),
        ({"layers": "net.0"}, "layers='net.0', expected a list"),
        ({"every_n_steps": 0}, "every_n_steps=0, expected a whole number >= 1"),
        ({"drop_fraction": 1.5}, "drop_fraction=1.5, expected"),
        ({"end_step": -1}, "end_step=-1, expected"),
        ({"init": "normal"}, "init='normal', expected one of"),
    ],
)
def test_bad_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        SparseTopology(**settings)
