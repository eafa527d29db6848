"""Monitors on masked networks: nothing is disturbed, keys and numbers are those of the layers as users know them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from masked import HOLDS, active_of, fill_masked, mask_weights, plain_twin
from runs import Classifier, conv, data, fit_tasks, loader, mlp, monitors, trainer
from torch import nn

from lightning_plasticity import TrainabilityProbe

MAKE = {"mlp": mlp, "conv": conv}


def masked_net(name: str, hold: str) -> nn.Module:
    torch.manual_seed(0)
    net = mask_weights(MAKE[name](), 0.4, HOLDS[hold])
    fill_masked(net)
    return net


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("name", MAKE)
def test_a_run_with_monitors_is_the_same(name: str, hold: str, tmp_path: Path) -> None:
    def make() -> Classifier:
        return Classifier(masked_net(name, hold))

    tasks = [loader(task, shuffle=True) for task in range(2)]
    plain = fit_tasks(make, tasks, [], tmp_path / "plain", max_epochs=2)
    watching = monitors()
    watching.append(
        TrainabilityProbe(
            num_steps=2, target="absolute", probe_samples=6, fresh=False, linearized_time=1.0, on_error="raise"
        )
    )
    tasks = [loader(task, shuffle=True) for task in range(2)]
    watched = fit_tasks(make, tasks, watching, tmp_path / "watched", max_epochs=2)
    assert {key for key in plain if plain[key] != watched[key]} == set()
    for monitor in watching:
        assert len(monitor.records) >= 2
        assert all(record.failure is None and record.values for record in monitor.records)
        keys = {key for record in monitor.records for key in record.values}
        assert not [key for key in keys if "parametrizations" in key or "_orig" in key]


@pytest.mark.parametrize("hold", HOLDS)
def test_numbers_are_of_active_coordinates_and_plain_layers(hold: str) -> None:
    net = masked_net("mlp", hold)
    twin = plain_twin(net, mlp())
    net(data()[0])
    twin = plain_twin(net, twin)
    active = active_of(net, twin)
    found = {}
    for key, module in {"masked": net, "plain": twin}.items():
        watching = monitors()
        trainer(watching, max_epochs=1).fit(Classifier(module), loader())
        found[key] = [monitor.records[0] for monitor in watching]
    for mine, theirs in zip(found["masked"], found["plain"], strict=True):
        assert set(mine.values) == set(theirs.values)
    about, whole = found["masked"][0].settings, found["plain"][0].settings
    for quantity in ("ggn", "hessian", "ntk"):
        assert about[quantity]["num_params"] == int(active.sum())
        assert about[quantity]["masked_params"] == int((~active).sum())
        assert "masked_params" not in whole[quantity]
    features = [(r.values, o.values) for r, o in zip(found["masked"], found["plain"], strict=True)][1]
    assert "plasticity/weights/norm/net.0" in features[0]
    for key, value in features[0].items():  # same weights, so the same features and the same norms
        assert value.value == pytest.approx(features[1][key].value, rel=1e-4), key


def test_the_trainability_probe_sees_the_same_however_masks_are_held() -> None:
    """Values under masks differ in nothing that is measured."""
    values = []
    for holder in ("parametrize", "prune"):
        twin = masked_net("mlp", holder)
        probe = TrainabilityProbe(
            optimizer=partial(torch.optim.SGD, lr=0.1),
            num_steps=2,
            target="absolute",
            probe_samples=6,
            fresh=False,
            linearized_time=1.0,
        )
        trainer([probe], max_epochs=1).fit(Classifier(twin), loader())
        values.append(probe.records[0].values)
    assert set(values[0]) == set(values[1])
    for key, value in values[0].items():
        assert value.value == pytest.approx(values[1][key].value, rel=1e-4, nan_ok=True), key
    assert "plasticity/trainability/useful_directions" in values[0]
