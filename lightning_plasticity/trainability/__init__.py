"""Can gradient descent still learn from these weights? Short training runs, forgotten afterwards."""

from lightning_plasticity.trainability.fresh import reinitialize
from lightning_plasticity.trainability.measure import measure_trainability, trainability
from lightning_plasticity.trainability.result import Curve, Trainability

__all__ = ["Curve", "Trainability", "measure_trainability", "reinitialize", "trainability"]
