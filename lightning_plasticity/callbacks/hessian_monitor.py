"""``HessianSpectrumMonitor``: the curvature spectrum at every task boundary."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch.nn.parameter import is_lazy

from lightning_plasticity.callbacks.arguments import choice, choices, decimal, function, label, numbers, whole_number
from lightning_plasticity.callbacks.kept_plans import KeptPlans
from lightning_plasticity.callbacks.live import live_optimizers
from lightning_plasticity.callbacks.measurement import Measurement
from lightning_plasticity.callbacks.monitor import BoundaryMonitor, OnError, Phase
from lightning_plasticity.callbacks.processes import describe
from lightning_plasticity.callbacks.progress import tell
from lightning_plasticity.curvature import Measured, MeasurementError, Spectrum, measure_hessian
from lightning_plasticity.curvature.budget import Budget, training_step_bytes
from lightning_plasticity.curvature.gram.estimate import gram_spectrum
from lightning_plasticity.curvature.gram.measure import MAX_ROWS
from lightning_plasticity.curvature.gram.plan import GramPlan, plan_gram
from lightning_plasticity.curvature.hessian.measure import LANCZOS_STEPS
from lightning_plasticity.curvature.hessian.plan import HessianPlan, plan_hessian
from lightning_plasticity.curvature.loss.closure import DEFAULT_OBJECTIVE, LossFunction, missing_objective
from lightning_plasticity.curvature.measured import on_few
from lightning_plasticity.curvature.samples import num_samples
from lightning_plasticity.linalg import Estimate
from lightning_plasticity.loggers import spectra_figure
from lightning_plasticity.nn.undisturbed import MODES, Mode
from lightning_plasticity.records import TaskRecord
from lightning_plasticity.regularization.base import check_names

Quantity = Literal["ggn", "hessian", "ntk"]
QUANTITIES = ("ggn", "hessian", "ntk")
PROBE_SAMPLES = 512
FEW_SAMPLES = 32  # of a training step whose batch is not at hand
MAX_SECONDS = 1.5
STEP_MULTIPLE = 4  # times the memory of a training step that a measurement may add
LEAST_MEMORY = 2**26
LONG_WORK = 2e8  # trainable parameters times samples from which a measurement may be long


class HessianSpectrumMonitor(BoundaryMonitor):
    """Measures the eigenvalue spectrum of the loss at task boundaries, without disturbing training.

    At a task's start: the weights it begins with, its data, before the first update. At its end: the same samples. The
    GGN is exact, through its Gram matrix; the Hessian is exact for few parameters, else estimated by Lanczos quadrature
    with 95 % intervals. Needs no change to the module: loss and outputs are found by watching its ``training_step``;
    override with ``loss_fn``, or ``curvature_loss(batch)`` and ``curvature_outputs(batch)`` on the module.

    Source: Prakash et al. 2026 (arXiv 2509.22335); quantities as in ``Spectrum``.

    Logged, with m one of ``ggn``, ``hessian``, ``ntk`` (``plasticity/end/...`` for the end of a task; estimates also
    with ``_lower`` and ``_upper``; those of the start also reach ``trainer.callback_metrics``):

    - ``plasticity/m/eps_rank_<eps>``: eigenvalues with ``|lambda|`` > eps, a count; eps in units of the loss.
    - ``plasticity/m/relative_eps_rank_<eps>``: the same above eps times the largest ``|lambda|``.
    - ``plasticity/m/effective_rank``: of ``|lambda|``, between 1 and the number of parameters.
    - ``plasticity/m/trace``, ``lambda_max``, ``lambda_min``: in units of the loss.
    - ``plasticity/m/negative_fraction``: share of negative eigenvalues (Hessian only).
    - ``plasticity/m/num_samples``: samples measured on.
    - ``plasticity/task``: index of the task; the x axis is the cumulative optimizer step.
    - histograms ``plasticity/m/spectrum_log10`` (of ``log10 |lambda|``, where it can be told from zero; of an estimate
      the resolved part) and figures ``plasticity/m/spectra`` (all tasks so far).

    Args:
        quantities: which matrices.
        eps: absolute thresholds of the eps-rank.
        relative_eps: thresholds relative to the largest ``|lambda|``.
        probe_samples: samples to measure on; None for 512. The GGN is exact on the first of them that keep its Gram
            matrix within ``max_rows`` where those are 32 or more, else estimated on all.
        when: ``"start"``, ``"end"`` or both.
        every_n_tasks: measure at tasks 0, n, 2n, ...
        data: what to measure on: a batch, dataset, loader, or callable ``(trainer, pl_module)``; None for the task's
            own training data.
        loss_fn: ``loss_fn(outputs, targets)`` for batches that are pairs.
        objective: for a module with several losses, as an actor and a critic have: measure its method
            ``<objective>_loss(batch)``, with ``<objective>_outputs(batch)``, instead of ``curvature_loss``.
        params: names or wildcards of the parameters to measure in, such as ``"critic.*"``; None for all trainable ones.
        num_steps: Lanczos steps of the Hessian.
        max_rows: bound on the GGN's Gram matrix, samples times (classes - 1).
        max_seconds: wall time of one measurement, all quantities together; None for any. Where it is short, samples,
            steps and method are chosen by a calibration at the run's first measurement, kept for all its tasks, and
            told in the record under ``budget``. Networks whose tasks take hours can afford more.
        max_memory: bytes beyond what the process holds; None for four times what a training step takes (weights,
            gradients, optimizer state, graph of the first batch), and at least 64 MiB.
        mode: ``"frozen"`` (BatchNorm and dropout off by type), ``"as_is"`` (what the optimizer sees) or ``"eval"``.
        seed: of probes and random state during a measurement.
        on_error: ``"warn"`` records the failure and training goes on; ``"raise"`` stops.
        save_dir: where ``plasticity.jsonl`` and ``spectra/*.npz`` go; None for the log directory.
        name: letters, digits and _, for monitors that otherwise differ in their data only: keys become
            ``plasticity/<name>/...``, and file names and checkpoints hold it too.
        fresh_control: measure a freshly initialised network on the same samples too, as ``plasticity/fresh/...``:
            what the numbers would be without a past. Its layers are set by their ``reset_parameters``.

    Raises:
        ValueError: for settings out of range, at construction; for an objective or parameters that the module does not
            have, when the fit starts.

    Example:
        >>> from lightning_plasticity import HessianSpectrumMonitor
        >>> monitor = HessianSpectrumMonitor(quantities=("ggn",), when="start")
        >>> monitor.records
        []
    """

    def __init__(
        self,
        quantities: Quantity | Sequence[Quantity] = ("ggn", "hessian"),
        eps: float | Sequence[float] = (1e-3, 1e-2, 1e-1),
        probe_samples: int | None = None,
        when: Phase | Sequence[Phase] = ("start", "end"),
        every_n_tasks: int = 1,
        data: Any = None,
        on_error: OnError = "warn",
        *,
        relative_eps: float | Sequence[float] = (1e-4, 1e-3, 1e-2),
        loss_fn: LossFunction | None = None,
        objective: str | None = None,
        params: str | list[str] | None = None,
        num_steps: int = LANCZOS_STEPS,
        max_rows: int = MAX_ROWS,
        max_seconds: float | None = MAX_SECONDS,
        max_memory: float | None = None,
        mode: Mode = "frozen",
        seed: int = 0,
        save_dir: str | None = None,
        name: str | None = None,
        fresh_control: bool = False,
    ) -> None:
        samples = PROBE_SAMPLES if probe_samples is None else probe_samples
        super().__init__(samples, when, every_n_tasks, data, on_error, save_dir, name, fresh_control)
        self.quantities = choices("quantities", quantities, QUANTITIES, f"some of {QUANTITIES}")
        self.eps = numbers("eps", eps)
        self.relative_eps = numbers("relative_eps", relative_eps)
        choice("mode", mode, MODES)
        function("loss_fn", loss_fn)
        self.loss_fn = loss_fn
        label("objective", objective)
        self.objective = DEFAULT_OBJECTIVE if objective is None else objective
        self.params = [params] if isinstance(params, str) else params
        if self.params is not None and not self.params:
            raise ValueError(f"params={params!r}, expected names or wildcards such as 'critic.*', or None for all.")
        self.num_steps = whole_number("num_steps", num_steps)
        self.max_rows = whole_number("max_rows", max_rows)
        self.budget = Budget(max_seconds, max_memory)
        self._plans = KeptPlans([max_seconds, max_memory, self.num_steps, self.max_rows])
        self.mode = mode
        self.seed = whole_number("seed", seed, least=0)
        self._spectra: dict[str, dict[int, Spectrum]] = {quantity: {} for quantity in self.quantities}

    def identity(self) -> dict[str, Any]:
        """Two monitors of different quantities keep their states apart."""
        own: dict[str, Any] = {} if self.objective == DEFAULT_OBJECTIVE else {"objective": self.objective}
        own |= {} if self.params is None else {"params": self.params}
        return {"quantities": self.quantities, "eps": self.eps, "mode": self.mode, **own}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an objective or parameters that the module does not have."""
        if self.objective != DEFAULT_OBJECTIVE and not hasattr(pl_module, f"{self.objective}_loss"):
            raise ValueError(missing_objective(pl_module, self.objective))
        check_names(pl_module, self.params)

    def state_dict(self) -> dict[str, Any]:
        """The records, and the spectra that the figure of all tasks shows."""
        spectra = {
            quantity: {task: (s.eigenvalues, s.weights, s.num_params, s.exact) for task, s in found.items()}
            for quantity, found in self._spectra.items()
        }
        return super().state_dict() | {"spectra": spectra, "plans": self._plans.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the records and the figure of the run that is resumed."""
        super().load_state_dict(state_dict)
        if self._resuming:
            if "plans" in state_dict:  # not in a checkpoint of version 0.1
                self._plans.load_state_dict(state_dict["plans"])
            for quantity, found in state_dict["spectra"].items():
                self._spectra[quantity] = {
                    task: Spectrum(eigenvalues, weights, num_params, exact, quantity)
                    for task, (eigenvalues, weights, num_params, exact) in found.items()
                }

    def may_be_long(self, pl_module: LightningModule) -> bool:
        """Whether parameters times samples are many."""
        known = [p for p in pl_module.parameters() if p.requires_grad and not is_lazy(p)]
        return self.probe_samples * sum(p.numel() for p in known) > LONG_WORK

    def plans(self) -> Any:
        """Samples, steps and method of each problem size."""
        return self._plans.state_dict()

    def take_plans(self, plans: Any) -> None:
        """Measure as rank zero does."""
        self._plans.load_state_dict(plans)

    def measure(self, trainer: Trainer, pl_module: LightningModule, batches: list[Any], phase: Phase) -> Measurement:
        """All quantities; one that fails leaves the others."""
        measurement = Measurement(settings={"mode": self.mode})
        started = time.perf_counter()
        for quantity in self.quantities:
            try:
                measured = Measured(
                    pl_module,
                    batches,
                    self.loss_fn,
                    self.params,
                    self.mode,
                    self.seed,
                    objective=self.objective,
                    **live_optimizers(pl_module),
                )
                spectrum = self._spectrum(trainer, measured, quantity, time.perf_counter() - started)
            except Exception as error:
                measurement.failures[quantity] = describe(error)
                measurement.retry |= not isinstance(error, MeasurementError)
                continue
            prefix = f"plasticity/{quantity}"
            measurement.values |= {f"{prefix}/{key}": value for key, value in self._numbers(spectrum).items()}
            measurement.spectra[quantity] = spectrum
            measurement.histograms[f"{prefix}/spectrum_log10"] = spectrum
            measurement.settings[quantity] = _about(spectrum)
            if note := spectrum.settings.get("note"):
                self._warn_once(f"{type(self).__name__}: {note}", note)
        return measurement

    def _spectrum(self, trainer: Trainer, measured: Measured, quantity: Quantity, spent: float) -> Spectrum:
        """By the plan made for a problem of this size, or one made now of what the others have left of the time."""
        left = max(self.budget.seconds - spent, self.budget.seconds / len(self.quantities))
        budget = Budget(None if math.isinf(left) else left, self.budget.max_memory)
        parameters = measured.parameters()
        size = f"{sum(p.numel() for p in parameters)} parameters, {num_samples(measured.batches)} samples"
        name = f"{quantity} of {size}"
        if quantity == "hessian":
            plan, new = self._plans.get(
                name,
                HessianPlan,
                lambda: plan_hessian(measured, parameters, self.num_steps, self._bounded(budget, measured)),
            )
            spectrum = measure_hessian(measured, budget=budget, plan=plan)
        else:
            gram_plan, new = self._plans.get(
                name,
                GramPlan,
                lambda: plan_gram(
                    measured, quantity, parameters, self.max_rows, self.num_steps, self._bounded(budget, measured)
                ),
            )
            spectrum = gram_spectrum(
                measured,
                quantity,
                method="auto",
                max_rows=self.max_rows,
                num_steps=self.num_steps,
                budget=budget,
                plan=gram_plan,
            )
        if new and (why := spectrum.settings.get("budget")):
            kept = "to keep to max_seconds and max_memory"
            tell(trainer, f"{type(self).__name__}: the {quantity} was measured with less, {kept}: {why}.")
        return spectrum

    def _bounded(self, budget: Budget, measured: Measured) -> Budget:
        """With four times what a training step takes, where memory has no bound of its own."""
        if budget.max_memory is not None:
            return budget
        assert self._tracker is not None
        batch = self._tracker.first_batch
        if batch is None:
            ((step,), _) = on_few(measured, (FEW_SAMPLES,), lambda few: training_step_bytes(few, few.batches[0]))
        else:
            step = training_step_bytes(measured, batch)
        return replace(budget, max_memory=max(STEP_MULTIPLE * step, LEAST_MEMORY))

    def _numbers(self, spectrum: Spectrum) -> dict[str, Estimate]:
        numbers = {f"eps_rank_{decimal(eps)}": spectrum.epsilon_rank(eps) for eps in self.eps}
        for eps in self.relative_eps:
            numbers[f"relative_eps_rank_{decimal(eps)}"] = spectrum.epsilon_rank(eps, relative=True)
        numbers |= {
            "effective_rank": spectrum.effective_rank(),
            "trace": spectrum.trace(),
            "lambda_max": spectrum.lambda_max(),
            "lambda_min": spectrum.lambda_min(),
            "num_samples": Estimate.exactly(spectrum.num_samples),
        }
        if spectrum.matrix == "hessian":
            numbers["negative_fraction"] = spectrum.negative_fraction()
        return numbers

    def figures(self, measurement: Measurement, record: TaskRecord) -> dict[str, Any]:
        """The spectra of all tasks so far, in one figure for each quantity."""
        if record.phase != self.when[0]:
            return {}
        drawn = {}
        for quantity, spectrum in measurement.spectra.items():
            self._spectra[quantity][record.task] = spectrum
            name = quantity.capitalize() if quantity == "hessian" else quantity.upper()
            samples = f"{spectrum.num_samples} samples"
            title = f"{name} at task {record.phase}, up to task {record.task}, {samples}"
            drawn[f"plasticity/{quantity}/spectra"] = spectra_figure(self._spectra[quantity], title)
        return drawn


def _about(spectrum: Spectrum) -> dict[str, Any]:
    names = ("method", "exact", "num_params", "num_samples", "num_products", "seconds", "resolution")
    return {name: getattr(spectrum, name) for name in names} | dict(spectrum.settings)
