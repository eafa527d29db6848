"""``TrainabilityProbe``: at every task boundary, try whether gradient descent still learns from these weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from lightning_plasticity.callbacks.arguments import choice, function, whole_number
from lightning_plasticity.callbacks.live import live_optimizers
from lightning_plasticity.callbacks.measurement import Measurement
from lightning_plasticity.callbacks.monitor import BoundaryMonitor, OnError, Phase
from lightning_plasticity.callbacks.processes import describe
from lightning_plasticity.callbacks.progress import tell
from lightning_plasticity.curvature import Measured, MeasurementError
from lightning_plasticity.curvature.linearized.measure import measure_linearized
from lightning_plasticity.curvature.loss.closure import LossFunction
from lightning_plasticity.linalg import Estimate
from lightning_plasticity.nn.batches import batch_size as size_of
from lightning_plasticity.nn.undisturbed import MODES, Mode
from lightning_plasticity.trainability import Trainability, measure_trainability
from lightning_plasticity.trainability.descent import Descent
from lightning_plasticity.trainability.measure import check_settings, default_every
from lightning_plasticity.trainability.result import Target

PROBE_SAMPLES = 512
MAX_SECONDS = 5.0
FLOW_STEPS = 10**6  # of the linearised prediction: so many small steps are gradient flow
QUANTITIES = ("initial_loss", "best_loss", "final_loss", "area")


class TrainabilityProbe(BoundaryMonitor):
    """Trains for a few steps on the new task from the present weights and from fresh ones, and undoes all of it.

    Asks what plasticity is about: can gradient descent from these weights bring the task's loss below a target within
    a budget of steps? The runs take the module's own ``training_step`` and copies of its own optimizers, in float32 and
    without regularisers, schedulers and callbacks; weights, optimizers, random states and metrics are put back bit by
    bit. With two seeds that makes four runs.

    Logged (``plasticity/end/...`` for the end of a task; means over seeds, with the least and the most as interval in
    the record; those of the start also reach ``trainer.callback_metrics``):

    - ``plasticity/trainability/steps_to_target``: optimizer steps until the loss on the probe data was at most the
      target, median over seeds; NaN when half of the seeds or more did not get there within the budget (the lower end
      in the record is then at most one more than the budget, the upper one infinite).
    - ``plasticity/trainability/reached``: share of the seeds that got there, 0 to 1.
    - ``plasticity/trainability/target_loss``: the target, in units of the loss.
    - ``plasticity/trainability/initial_loss``, ``best_loss``, ``final_loss``: on the probe data, in units of the loss;
      infinite where it diverged.
    - ``plasticity/trainability/area``: mean loss over the steps (area under the curve / steps).
    - ``plasticity/trainability/fresh_best_loss``: best loss from fresh initialisations.
    - ``plasticity/trainability/gap_to_fresh``: best loss minus that of the fresh run; above 0, plasticity is lost.
    - ``plasticity/trainability/num_steps``, ``num_samples``: steps taken and samples probed on.
    - with ``linearized_time``: ``plasticity/trainability/linearized_loss_ratio`` (what gradient flow on the linearised
      network leaves of the squared residual), ``useful_directions`` (NTK eigenvalues above 1 / linearized_time, where
      samples times outputs are at most 2000) and ``useful_share`` (of the squared residual in those directions).
    - ``plasticity/task``: index of the task; the x axis is the cumulative optimizer step.

    The loss curves of all runs, (steps, losses) for each seed, are in the record's ``settings["curves"]``.

    Args:
        num_steps: T, the budget of steps.
        target: ``"fresh"``: the best loss of a fresh network in the same budget, on the same order of the data, plus a
            share ``tau`` of it; ``"relative"``: ``tau`` times the loss before the first step; ``"absolute"``: ``tau``.
        tau: see ``target``.
        seeds: runs of each kind, with other orders of the data and fresh initialisations.
        probe_samples: samples to train on; None for 512.
        when: ``"start"``, ``"end"`` or both.
        every_n_tasks: measure at tasks 0, n, 2n, ...
        data: what to train on: a batch, dataset, loader, or callable ``(trainer, pl_module)``; None for the task's own
            training data.
        on_error: ``"warn"`` records the failure and training goes on; ``"raise"`` stops.
        optimizer: a function of the parameters that returns an optimizer; None for copies of the module's own, with
            the learning rates of that moment and the Trainer's gradient clipping.
        optimizer_state: ``"fresh"``, or ``"carried"``: go on with the moments the live optimizer has (fresh networks
            always have a fresh state).
        fresh: ``fresh(module)`` initialises the module in place, or returns a new one; None for ``reset_parameters`` of
            every submodule, False for no fresh runs. Pass it where ``__init__`` initialises in its own way.
        loss_fn: ``loss_fn(outputs, targets)`` for batches that are pairs.
        batch_size: of minibatches; None for the size of the task's first batch.
        shuffle: a new order of the samples for each pass.
        evaluate_every: steps between evaluations on all probe data; None for 20 in all.
        linearized_time: learning rate times steps of the linearised prediction, such as 1.0; None for none.
        max_seconds: wall time of all runs together; None for any. Where it is short the steps are cut, at the run's
            first measurement and for all its tasks, and the record says so under ``budget``.
        mode: ``"as_is"`` (BatchNorm and dropout as in training), ``"frozen"`` or ``"eval"``.
        seed: of the first run.
        save_dir: where ``plasticity.jsonl`` goes; None for the log directory.
        name: letters, digits and _, for monitors that otherwise differ in their data only: keys become
            ``plasticity/<name>/...``, and file names and checkpoints hold it too.

    Raises:
        ValueError: for settings out of range, at construction.

    Example:
        >>> from lightning_plasticity import TrainabilityProbe
        >>> TrainabilityProbe(num_steps=200, target="relative", tau=0.5).records
        []
    """

    def __init__(
        self,
        num_steps: int = 100,
        target: Target = "fresh",
        tau: float = 0.1,
        seeds: int = 2,
        probe_samples: int | None = None,
        when: Phase | Sequence[Phase] = "start",
        every_n_tasks: int = 1,
        data: Any = None,
        on_error: OnError = "warn",
        *,
        optimizer: Callable[[Any], Any] | None = None,
        optimizer_state: Literal["fresh", "carried"] = "fresh",
        fresh: Callable[[Any], Any] | bool | None = None,
        loss_fn: LossFunction | None = None,
        batch_size: int | None = None,
        shuffle: bool = True,
        evaluate_every: int | None = None,
        linearized_time: float | None = None,
        max_seconds: float | None = MAX_SECONDS,
        mode: Mode = "as_is",
        seed: int = 0,
        save_dir: str | None = None,
        name: str | None = None,
    ) -> None:
        samples = PROBE_SAMPLES if probe_samples is None else probe_samples
        super().__init__(samples, when, every_n_tasks, data, on_error, save_dir, name)
        how = Descent(whole_number("num_steps", num_steps), default_every(num_steps, evaluate_every), batch_size)
        check_settings(how, target, tau, seeds, fresh, max_seconds)
        choice("optimizer_state", optimizer_state, ("fresh", "carried"))
        choice("mode", mode, MODES)
        function("loss_fn", loss_fn)
        if optimizer is not None and not callable(optimizer):
            raise ValueError(f"optimizer={optimizer!r}, expected a function of the parameters, or None.")
        if linearized_time is not None and not 0 < linearized_time < float("inf"):
            raise ValueError(f"linearized_time={linearized_time!r}, expected a positive number, or None.")
        self.num_steps = num_steps
        self.target: Target = target
        self.tau = tau
        self.seeds = seeds
        self.optimizer = optimizer
        self.optimizer_state = optimizer_state
        self.fresh = fresh
        self.loss_fn = loss_fn
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.evaluate_every = evaluate_every
        self.linearized_time = linearized_time
        self.max_seconds = max_seconds
        self.mode = mode
        self.seed = whole_number("seed", seed, least=0)
        self._cut: tuple[int, str] | None = None  # fewer steps for the whole run, and why
        self._seen_batch_size: int | None = None  # of training

    def identity(self) -> dict[str, Any]:
        """Two probes of different budgets or targets keep their states apart."""
        about = {"num_steps": self.num_steps, "target": self.target, "tau": self.tau, "mode": self.mode}
        return about | {"optimizer_state": self.optimizer_state}

    def plans(self) -> Any:
        """The steps that the time allows."""
        return self._cut

    def take_plans(self, plans: Any) -> None:
        """Take as many steps as rank zero."""
        self._cut = plans

    def state_dict(self) -> dict[str, Any]:
        """The records, the steps that the time allows, and the size of minibatches."""
        return super().state_dict() | {"cut": self._cut, "batch_size": self._seen_batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the records and the steps of the run that is resumed."""
        super().load_state_dict(state_dict)
        if self._resuming:
            self._seen_batch_size = state_dict["batch_size"]
            self._cut = state_dict["cut"] if self.max_seconds is not None else None

    def measure(self, trainer: Trainer, pl_module: LightningModule, batches: list[Any], phase: Phase) -> Measurement:
        """The runs, and what the linearised network predicts; one that fails leaves the other."""
        measurement = Measurement(settings={"mode": self.mode})
        live = live_optimizers(pl_module)
        measured = Measured(pl_module, batches, self.loss_fn, mode=self.mode, seed=self.seed, **live)
        for part, numbers in (("trainability", self._runs), ("linearized", self._linearized)):
            try:
                measurement.values |= numbers(trainer, measured, measurement)
            except Exception as error:
                measurement.failures[part] = describe(error)
                measurement.retry |= not isinstance(error, MeasurementError)
        return measurement

    def _runs(self, trainer: Trainer, measured: Measured, measurement: Measurement) -> dict[str, Estimate]:
        num_steps, max_seconds = (self.num_steps, self.max_seconds) if self._cut is None else (self._cut[0], None)
        every = default_every(num_steps, self.evaluate_every)
        found = measure_trainability(
            measured,
            self._optimizers(trainer, measured) if self.optimizer is None else self.optimizer,
            Descent(num_steps, every, self._batch_size(measured), self.shuffle, self._clip(trainer)),
            carry_state=self.optimizer_state == "carried",
            target=self.target,
            tau=self.tau,
            seeds=self.seeds,
            fresh=self.fresh,
            max_seconds=max_seconds,
        )
        if why := found.settings.get("budget"):
            self._cut = (found.num_steps, why)
            tell(trainer, f"{type(self).__name__}: {why}; see max_seconds.")
        cut = {} if self._cut is None else {"budget": self._cut[1]}
        about = {"target": self.target, "tau": self.tau, "optimizer_state": self.optimizer_state}
        measurement.settings |= {**found.settings, **cut, **about, "curves": _curves(found)}
        if found.fresh_failure is not None:
            measurement.failures["fresh networks"] = found.fresh_failure
        return {f"plasticity/trainability/{key}": value for key, value in _numbers(found).items()}

    def _linearized(self, trainer: Trainer, measured: Measured, measurement: Measurement) -> dict[str, Estimate]:
        if self.linearized_time is None:
            return {}
        found = measure_linearized(measured, self.linearized_time / FLOW_STEPS, FLOW_STEPS)
        final, eps = found.final_loss, 1.0 / self.linearized_time
        start = found.initial_loss or 1.0
        numbers = {
            "linearized_loss_ratio": Estimate(final.value / start, final.lower / start, final.upper / start),
            "useful_share": Estimate.exactly(1.0 - found.share_below(eps)),
        }
        if found.lanczos is None:
            numbers["useful_directions"] = Estimate.exactly(int((found.nodes > eps).sum()))
        return {f"plasticity/trainability/{key}": value for key, value in numbers.items()}

    def _optimizers(self, trainer: Trainer, measured: Measured) -> list[Any]:
        found = list(trainer.optimizers)
        stepped = {id(p) for optimizer in found for group in optimizer.param_groups for p in group["params"]}
        if not stepped:  # where a module has no optimizer, Lightning makes one without parameters
            raise MeasurementError(
                "The module has no optimizer (configure_optimizers returns none); pass optimizer=, a function of the "
                "parameters such as functools.partial(torch.optim.SGD, lr=0.1)."
            )
        if stepped.isdisjoint(id(p) for p in measured.parameters()):
            raise MeasurementError(
                "The module's optimizers step pieces of its weights, and what is measured is a whole copy; pass "
                "optimizer=, a function of the parameters such as functools.partial(torch.optim.SGD, lr=0.1)."
            )
        rates = [float(group["lr"]) for optimizer in found for group in optimizer.param_groups if "lr" in group]
        if rates and not any(rates):
            raise MeasurementError(
                "All learning rates are 0 at this moment, as a warm-up begins, and nothing would move; pass "
                "optimizer=, a function of the parameters such as functools.partial(torch.optim.SGD, lr=0.1)."
            )
        return found

    def _batch_size(self, measured: Measured) -> int | None:
        """The user's, else that of training."""
        if self.batch_size is not None:
            return self.batch_size
        assert self._tracker is not None
        first = self._tracker.first_batch
        if first is not None:
            self._seen_batch_size = max(1, size_of(first))
        return self._seen_batch_size

    def _clip(self, trainer: Trainer) -> tuple[float, str] | None:
        if self.optimizer is not None or not trainer.gradient_clip_val:
            return None
        algorithm: Any = trainer.gradient_clip_algorithm or "norm"
        return float(trainer.gradient_clip_val), str(getattr(algorithm, "value", algorithm))


def _curves(found: Trainability) -> dict[str, Any]:
    """For the record, one list for each seed: when the loss on all the data was evaluated, and what it was."""
    kinds = {"present": found.curves, "fresh": found.fresh_curves}
    return {kind: [[list(c.steps), list(c.losses)] for c in curves] for kind, curves in kinds.items()}


def _numbers(found: Trainability) -> dict[str, Estimate]:
    numbers = {name: getattr(found, name) for name in QUANTITIES}
    numbers |= {"num_steps": Estimate.exactly(found.num_steps), "num_samples": Estimate.exactly(found.num_samples)}
    if found.fresh_curves:
        numbers |= {"fresh_best_loss": found.fresh_best_loss, "gap_to_fresh": found.gap_to_fresh}
    if found.fresh_curves or found.target != "fresh":
        numbers |= {
            "target_loss": found.target_loss,
            "steps_to_target": found.steps_to_target,
            "reached": Estimate.exactly(found.reached),
        }
    return numbers
