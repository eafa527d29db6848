"""``FeatureRankMonitor``: rank of the hidden features, dead units and weight norms at every task boundary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_plasticity.callbacks.arguments import choice, decimal, function, numbers
from lightning_plasticity.callbacks.live import live_optimizers
from lightning_plasticity.callbacks.measurement import Measurement
from lightning_plasticity.callbacks.monitor import BoundaryMonitor, OnError, Phase
from lightning_plasticity.callbacks.processes import describe
from lightning_plasticity.curvature import LossClosure
from lightning_plasticity.curvature.loss.closure import LossFunction
from lightning_plasticity.linalg import (
    Estimate,
    effective_rank_of,
    srank_of,
    stable_rank_of,
)
from lightning_plasticity.linalg.feature_matrix import FeatureLayout
from lightning_plasticity.linalg.functionals import count_above
from lightning_plasticity.metrics import DormantUnitRatio, SingularValues
from lightning_plasticity.nn import FeatureTaps, HiddenLayer, find_hidden_layers, named_layers, undisturbed
from lightning_plasticity.nn.masks import active_entries, plain_names
from lightning_plasticity.nn.undisturbed import MODES, Mode

PROBE_SAMPLES = 2048
FEATURE_RANK_EPS = 0.01  # Lyle 2022


class FeatureRankMonitor(BoundaryMonitor):
    """Measures the rank of hidden features, dormant units and weight norms at task boundaries, undisturbed.

    All numbers are exact for the probe samples, computed from float64 second moments; features are not centred. Every
    rank is capped by ``max_rank`` = min(samples, features): compare at equal caps only.

    Logged for each hidden layer (``plasticity/end/...`` for the end of a task), and without ``/<layer>`` the mean over
    them; those of the start also reach ``trainer.callback_metrics``:

    - ``plasticity/features/effective_rank/<layer>``: exp of the entropy of sigma / sum sigma (Roy and Vetterli 2007).
    - ``plasticity/features/stable_rank/<layer>``: sum sigma^2 / max sigma^2.
    - ``plasticity/features/srank/<layer>``: fewest sigma that hold 99 % of their sum (Kumar 2021, 2010.14498).
    - ``plasticity/features/approximate_rank/<layer>``: the same of sigma^2 (Yang 2020, 1909.12255).
    - ``plasticity/features/feature_rank/<layer>``: sigma(F / sqrt N) above 0.01 (Lyle 2022, 2204.09560).
    - ``plasticity/features/max_rank/<layer>``: the cap min(N, D).
    - ``plasticity/features/dead_units/<layer>``: share of units that are 0 on every sample.
    - ``plasticity/features/dormant_units_<tau>/<layer>``: share of units with mean ``|h|`` at most tau times the
      layer's (Sokar 2023, 2302.12902).
    - ``plasticity/weights/norm/<layer>``: 2-norm of each weight; ``plasticity/weights/norm`` of all together.
    - ``plasticity/task``: index of the task; the x axis is the cumulative optimizer step.
    - histograms ``plasticity/features/singular_values_log10/<layer>``.

    Convolutions: with ``conv="positions"`` each position is a sample and each channel a feature; with ``"flatten"``
    each sample is one row. The numbers of the two cannot be compared.

    Args:
        layers: names or wildcards (``["net.1", "encoder.*"]``); None for all hidden activations that feed a later
            weight, and for containers of blocks the outputs of the blocks.
        probe_samples: samples to measure on; None for 2048.
        when: ``"start"``, ``"end"`` or both.
        every_n_tasks: measure at tasks 0, n, 2n, ...
        data: what to measure on: a batch, dataset, loader, or callable ``(trainer, pl_module)``; None for the task's
            own training data.
        loss_fn: ``loss_fn(outputs, targets)`` for modules whose training step cannot be run on the probe data.
        dormant_tau: thresholds of dormancy.
        conv: ``"positions"`` or ``"flatten"``.
        mode: as in ``HessianSpectrumMonitor``.
        on_error: ``"warn"`` records the failure and training goes on; ``"raise"`` stops.
        save_dir: where ``plasticity.jsonl`` goes; None for the log directory.
        name: letters, digits and _, for monitors that otherwise differ in their data only: keys become
            ``plasticity/<name>/...``, and file names and checkpoints hold it too.
        fresh_control: measure a freshly initialised network on the same samples too, as ``plasticity/fresh/...``:
            what the numbers would be without a past. Its layers are set by their ``reset_parameters``.

    Raises:
        ValueError: for settings out of range, at construction; for unknown layer names, when the fit starts.

    Example:
        >>> from lightning_plasticity import FeatureRankMonitor
        >>> FeatureRankMonitor(layers=["net.1"]).probe_samples
        2048
    """

    def __init__(
        self,
        layers: list[str] | None = None,
        probe_samples: int | None = None,
        when: Phase | Sequence[Phase] = ("start", "end"),
        on_error: OnError = "warn",
        *,
        every_n_tasks: int = 1,
        data: Any = None,
        loss_fn: LossFunction | None = None,
        dormant_tau: float | Sequence[float] = (0.025, 0.1),
        conv: FeatureLayout = "positions",
        mode: Mode = "frozen",
        save_dir: str | None = None,
        name: str | None = None,
        fresh_control: bool = False,
    ) -> None:
        samples = PROBE_SAMPLES if probe_samples is None else probe_samples
        super().__init__(samples, when, every_n_tasks, data, on_error, save_dir, name, fresh_control)
        if isinstance(layers, str) or (layers is not None and not layers):
            raise ValueError(
                f"layers={layers!r}, expected a list of names such as ['net.1'], or None for all hidden layers."
            )
        choice("mode", mode, MODES)
        function("loss_fn", loss_fn)
        SingularValues(conv=conv)  # refuses an unknown layout
        self.layers = layers
        self.loss_fn = loss_fn
        self.dormant_tau = numbers("dormant_tau", dormant_tau)
        self.conv = conv
        self.mode = mode
        self._layers: list[HiddenLayer] | None = None

    def identity(self) -> dict[str, Any]:
        """Two monitors of different layers keep their states apart."""
        return {"layers": self.layers, "conv": self.conv, "mode": self.mode}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse unknown layer names before training starts."""
        self._layers = None if self.layers is None else named_layers(pl_module, self.layers)

    def measure(self, trainer: Trainer, pl_module: LightningModule, batches: list[Any], phase: Phase) -> Measurement:
        """Stream the probe batches through the network once and summarise what the layers showed."""
        live = live_optimizers(pl_module)
        if self._layers is None:
            with undisturbed(pl_module, mode=self.mode, full_precision=True, **live) as collected:
                closure = LossClosure(pl_module, self.loss_fn, collected)
                self._layers = find_hidden_layers(pl_module, lambda: closure.run(batches[0]))
        measurement = Measurement(settings={"mode": self.mode, "conv": self.conv})
        statistics = {layer.name: _LayerStatistics(layer, self.conv, self.dormant_tau) for layer in self._layers}
        measuring = undisturbed(pl_module, mode=self.mode, full_precision=True, **live)
        with measuring as collected, FeatureTaps(pl_module, self._layers) as taps:
            closure = LossClosure(pl_module, self.loss_fn, collected)
            for index, batch in enumerate(batches):
                taps.clear()
                closure.run(batch, index)
                for name, layer in statistics.items():
                    try:
                        for activations in taps.calls(name):
                            layer.update(activations)
                    except (TypeError, ValueError) as error:  # a scalar, say, or widths that differ between calls
                        measurement.failures[name] = describe(error)
        measurement.values |= _weight_norms(pl_module)
        self._summarise(statistics, measurement)
        return measurement

    def _summarise(self, statistics: dict[str, _LayerStatistics], measurement: Measurement) -> None:
        found: dict[str, dict[str, float]] = {}
        tags = _tags(statistics)
        for name, layer in statistics.items():
            if name in measurement.failures:
                continue
            if layer.num_samples == 0:
                measurement.failures[name] = "The layer was not reached on the probe data; see layers=[...]."
                continue
            sigma = layer.singular_values.compute().reshape(-1)  # torchmetrics squeezes a single one
            if not bool(torch.isfinite(sigma).all()):
                measurement.failures[name] = "The features hold NaN or inf; look for them in weights and data."
                continue
            found[name] = layer.numbers(sigma)
            key = f"plasticity/features/singular_values_log10/{tags[name]}"
            measurement.histograms[key] = (sigma, torch.ones_like(sigma))
        if not statistics:
            measurement.failures["features"] = (
                "No hidden layer was found: on the probe data the step ran none whose output a later weight reads. "
                "Where it returns before its forward pass, give data=...; else name layers with layers=[...]."
            )
        for name, own in found.items():
            for key, number in own.items():
                measurement.values[f"plasticity/features/{key}/{tags[name]}"] = Estimate.exactly(number)
        if found:
            for key in next(iter(found.values())):
                mean = sum(own[key] for own in found.values()) / len(found)
                measurement.values[f"plasticity/features/{key}"] = Estimate.exactly(mean)
            measurement.settings["num_samples"] = {name: statistics[name].num_samples for name in found}


class _LayerStatistics:
    """Streaming statistics of one layer's activations."""

    def __init__(self, layer: HiddenLayer, conv: FeatureLayout, taus: Sequence[float]) -> None:
        options: dict[str, Any] = {"conv": conv, "channel_dim": layer.channel_dim}
        options["sync_on_compute"] = False  # all processes see the same samples
        self.singular_values = SingularValues(**options)
        thresholds = {"dead_units": 0.0} | {f"dormant_units_{decimal(tau)}": tau for tau in taus}
        self.units = {
            name: DormantUnitRatio(tau=tau, channel_dim=layer.channel_dim, sync_on_compute=False)
            for name, tau in thresholds.items()
        }

    @property
    def num_samples(self) -> int:
        return int(self.singular_values.num_samples)

    def update(self, activations: Tensor) -> None:
        activations = activations.detach().cpu()
        self.singular_values.update(activations)
        for metric in self.units.values():
            metric.update(activations)

    def numbers(self, sigma: Tensor) -> dict[str, float]:
        ranks = {
            "effective_rank": effective_rank_of(sigma),
            "stable_rank": stable_rank_of(sigma),
            "srank": srank_of(sigma),
            "approximate_rank": srank_of(sigma**2),
            "feature_rank": count_above(sigma / self.num_samples**0.5, FEATURE_RANK_EPS),
            "max_rank": torch.tensor(float(len(sigma))),
        }
        ranks |= {name: metric.compute() for name, metric in self.units.items()}
        return {name: float(value) for name, value in ranks.items()}


def _weight_norms(module: torch.nn.Module) -> dict[str, Estimate]:
    """2-norm of every weight (matrices and kernels), and of all of them together; NaN where a weight holds NaN.

    What is kept of a weight under its mask does not count.
    """
    active = active_entries(module)
    norms = {
        re.sub(r"(^|\.)parametrizations\.", r"\1", name).removesuffix(".weight"): float(
            (parameter.detach()[active[parameter]] if parameter in active else parameter.detach()).double().norm()
        )
        for parameter, name in plain_names(module).items()
        if parameter.ndim >= 2
    }
    tags = _tags(norms)
    values = {f"plasticity/weights/norm/{tags[name]}": Estimate.exactly(norm) for name, norm in norms.items()}
    values["plasticity/weights/norm"] = Estimate.exactly(sum(norm**2 for norm in norms.values()) ** 0.5)
    return values


def _tags(names: Iterable[str]) -> dict[str, str]:
    """Names as keys may hold them; where two would be the same, the later one is numbered."""
    tags: dict[str, str] = {}
    for name in names:
        tag = plain = re.sub(r"[^A-Za-z0-9_.]", "_", name)
        number = 1
        while tag in tags.values():
            number += 1
            tag = f"{plain}_{number}"
        tags[name] = tag
    return tags
