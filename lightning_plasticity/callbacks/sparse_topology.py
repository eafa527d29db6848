"""The callback for sparse weights: puts masks on before the optimizer is made, and says when they change."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_plasticity.callbacks.arguments import choice, whole_number
from lightning_plasticity.callbacks.intervention import EngineIntervention, check_number, summed_over_processes
from lightning_plasticity.nn.masked_layers import masks_of
from lightning_plasticity.sparsity import SparseTopologyEngine, chosen_layers, sparsify
from lightning_plasticity.sparsity.density import Distribution, check_density
from lightning_plasticity.sparsity.engine import GROWN_INITS, GrownInit
from lightning_plasticity.sparsity.rules import METHODS, Method


class SparseTopology(EngineIntervention):
    """Trains a sparse network: masks on weights, fixed or moving.

    ``"static"``: random masks that stay. ``"set"`` (Mocanu et al. 2018, arXiv 1707.04780): drop the smallest positive
    and the largest negative weights, grow at random. ``"rigl"`` (Evci et al. 2020, arXiv 1911.11134): drop the smallest
    weights, grow where the dense gradient of the last minibatch is largest. ``sparsify`` says how masks are drawn,
    ``SparseTopologyEngine`` and ``exchanged`` how they change; as many entries are grown as dropped, in every layer.

    The masks are put on when the fit is set up, before ``configure_optimizers``, and are part of the module's
    ``state_dict``. Masks that are there already (of an earlier fit, or of ``sparsify``) are kept. A checkpoint is
    tested with the same callback, or in a module that has been through ``sparsify``.

    Under DDP gradients are summed over processes, which keep the same masks. Under gradient accumulation it acts once
    for each optimizer step.

    Logs ``plasticity/sparsity/density`` (share of active weights) when training starts, and at each update
    ``plasticity/sparsity/exchanged`` (entries dropped, and as many grown), each also with ``/<layer>``.

    Args:
        density: share of the weights that stay, over all sparse layers, in (0, 1]; exact, see ``active_counts``.
        distribution: over the layers: ``"erk"`` or ``"uniform"``.
        method: ``"static"``, ``"set"`` or ``"rigl"``.
        layers: names or wildcards of Linear and convolution layers; None for all, the first and the last included.
        every_n_steps: optimizer steps between updates; RigL's 100. None updates at each epoch's end, as SET does.
        drop_fraction: share of each layer's active weights that an update exchanges, in [0, 1]. RigL's falls to 0 at
            ``end_step`` on a half cosine.
        end_step: optimizer step, counted over all fits, from which on the masks stay; RigL's paper has 75 % of
            training. None for no end, and a constant share: for streams of tasks.
        init: grown weights: ``"zero"``, or ``"default"``, a draw from the layer's initial distribution (SET's paper).
        restart_steps: give grown weights step counts of their own under Adam and AdamW. This may cost as much as the
            whole step of a small network; without, first steps of grown weights are up to three times too long.
        seed: of the masks and the draws; training's random numbers are not used.

    Raises:
        ValueError: for settings out of range; when the fit is set up, for layers that cannot be sparse, or masks of
            another density.
    """

    label = "sparsity"

    def __init__(
        self,
        density: float = 0.1,
        distribution: Distribution = "erk",
        method: Method = "static",
        layers: list[str] | None = None,
        every_n_steps: int | None = 100,
        drop_fraction: float = 0.3,
        end_step: int | None = None,
        init: GrownInit = "zero",
        restart_steps: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_density(density, distribution)
        choice("method", method, METHODS)
        choice("init", init, GROWN_INITS)
        if isinstance(layers, str) or (layers is not None and not layers):
            raise ValueError(f"layers={layers!r}, expected a list of names such as ['net.0'], or None for all.")
        self.density = float(density)
        self.distribution: Distribution = distribution
        self.method: Method = method
        self.layers = layers
        self.every_n_steps = None if every_n_steps is None else whole_number("every_n_steps", every_n_steps)
        self.drop_fraction = check_number("drop_fraction", drop_fraction, 0, 1)
        self.end_step = None if end_step is None else whole_number("end_step", end_step)
        self.init: GrownInit = init
        self.restart_steps = restart_steps
        self.seed = whole_number("seed", seed, 0)
        self._loading: Any = None  # handle of the hook that puts masks on for a checkpoint
        self._asked = False  # to update after the next step
        self._updates: bool | None = None  # whether an update follows the present batch; None: the period says

    @property
    def log_prefix(self) -> str:
        """Density is no intervention."""
        return f"plasticity/{self.label}"

    @property
    def state_key(self) -> str:
        """Two of other layers keep their states apart."""
        return self._generate_state_key(layers=self.layers)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put masks on: for a fit now, else when a checkpoint is loaded that has some."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._put_masks(pl_module)
        else:

            def before_loading(module: Any, state: dict[str, Any], *args: Any) -> None:
                if any(".parametrizations.weight.0.mask" in key for key in state):
                    self._put_masks(pl_module)

            hooked: Any = pl_module
            self._loading = hooked.register_load_state_dict_pre_hook(before_loading)

    def _stop(self) -> None:
        super()._stop()
        if self._loading is not None:
            self._loading.remove()
            self._loading = None

    def _put_masks(self, pl_module: LightningModule) -> None:
        masked = self._masked(pl_module)
        if not masked:
            sparsify(pl_module, self.density, self.distribution, self.layers, self.seed)
            return
        masks = [masks_of(layer)["weight"].mask for layer in masked.values()]
        active, size = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
        if active != round(self.density * size):
            raise ValueError(
                f"SparseTopology(density={self.density}) found masks with {active} of {size} weights active in "
                f"{', '.join(masked)}, expected {round(self.density * size)}. What to do: give the density "
                f"({active / size:.6g}) and the layers of these masks, or a module without masks."
            )

    def _masked(self, pl_module: LightningModule) -> dict[str, Any]:
        """The layers that are meant and have masks."""
        chosen, _ = chosen_layers(pl_module, self.layers)
        return {name: layer for name, layer in chosen.items() if masks_of(layer)}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the densities; a checkpoint's masks have been restored."""
        super().on_train_start(trainer, pl_module)
        masks = {name: masks_of(layer)["weight"].mask for name, layer in self._masked(pl_module).items()}
        active = sum(int(mask.sum()) for mask in masks.values())
        densities = {name: float(mask.float().mean()) for name, mask in masks.items()}
        self.log_counts(trainer, "density", densities, active / sum(mask.numel() for mask in masks.values()))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record dense gradients in this batch, if an update follows that needs them."""
        if self.method == "static":
            return
        if self._engine is None:
            self.forget_other(pl_module)
            self.adopt(self._make_engine(pl_module, list(trainer.optimizers)), pl_module)
        self._updates = None if self.every_n_steps is not None else bool(trainer.is_last_batch)
        if self._asked or self.on_demand:
            self._updates = self._asked
        self._engine.begin(self._updates)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after a batch that ended in an optimizer step, if it is time."""
        if self._engine is None:
            return
        self._engine.pause()
        if self.stepped(trainer):
            self._asked = self._asked and not self._updates
            self._log(trainer, self._engine.step(summed_over_processes(trainer), self._updates))

    def intervene(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the masks now; with RigL, which needs a gradient, after the next optimizer step.

        Raises:
            RuntimeError: outside of a fit, or for masks that are static.
        """
        if self._engine is None:
            raise RuntimeError(
                f"SparseTopology(method={self.method!r}) cannot update masks now; expected method='set' or 'rigl', "
                "among the Trainer's callbacks, after the first batch has started."
            )
        if self.method == "rigl":
            self._asked = True
        else:
            self._log(trainer, self._engine.exchange())

    def _make_engine(self, pl_module: LightningModule, optimizers: list[Any]) -> SparseTopologyEngine:
        return SparseTopologyEngine(
            self._masked(pl_module),
            optimizers,
            method=self.method,
            every_n_steps=self.every_n_steps,
            drop_fraction=self.drop_fraction,
            end_step=self.end_step,
            init=self.init,
            restart_steps=self.restart_steps,
            seed=self.seed,
        )

    def _log(self, trainer: Trainer, counts: dict[str, int]) -> None:
        if counts:
            self.log_counts(trainer, "exchanged", counts)

    def state_dict(self) -> dict[str, Any]:
        """The engine's state, and whether it has been asked to act."""
        return {**super().state_dict(), "asked": self._asked}

    def restore(self, state: dict[str, Any]) -> None:
        """Keep it for the engine that the next batch will bring."""
        super().restore(state)
        self._asked = bool(state["asked"])
