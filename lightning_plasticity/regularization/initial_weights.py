"""The initial weights that some regularisers compare with: kept for a module over fits, and in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_plasticity.regularization.base import Regularizer, chosen_parameters


class InitialWeights:
    """What each regulariser holds of each parameter, from the time that it first sees it.

    At the start of a fit that is all there is; lazy modules and layers added later come when a penalty meets them.
    """

    def __init__(self) -> None:
        self._held: dict[str, dict[str, Tensor]] = {}  # by regulariser and parameter

    def pairs(self, regularizer: Regularizer, key: str, module: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """The regulariser's parameters, each with what it is compared with.

        Args:
            regularizer: one that ``needs_references``.
            key: the same for the regulariser that takes this one's place in the next fit.
            module: the network.

        Raises:
            ValueError: for a parameter whose shape is not that of its initial value.
        """
        held = self._held.setdefault(key, {})
        pairs: list[tuple[Tensor, Tensor]] = []
        for name, parameter in chosen_parameters(module, regularizer.params):
            if name not in held:
                held[name] = regularizer.reference(parameter.detach())
            if held[name].shape != parameter.shape:
                raise ValueError(
                    f"{name} has shape {tuple(parameter.shape)}, but its initial value, which "
                    f"{type(regularizer).__name__} holds, has {tuple(held[name].shape)}. Leave it out (params=[...] "
                    "naming the others), or start over with a new callback, or, for the mixin, with "
                    "module.regularization_engine.initial_weights.clear()."
                )
            pairs.append((parameter, held[name].to(parameter.device)))
        return pairs

    def clear(self) -> None:
        """Let the next fit, or the next penalty, take them anew."""
        self._held.clear()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """All that is held."""
        return self._held

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Hold this instead."""
        self._held = {key: dict(held) for key, held in state.items()}
