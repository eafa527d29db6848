"""This package, by its public functions."""

from torch.nn import functional as F

from benchmarks.peers.adapters import Peer
from lightning_plasticity.curvature import HessianOperator, ggn_spectrum, hessian_spectrum
from lightning_plasticity.nn import undisturbed


def hessian(problem, num_steps):
    spectrum = hessian_spectrum(problem.model, F.cross_entropy, problem.data, method="lanczos", num_steps=num_steps)
    return {"lambda_max": spectrum.lambda_max().value}


def product(problem):
    with undisturbed(problem.model):
        loss = F.cross_entropy(problem.model(problem.inputs), problem.targets)
        operator = HessianOperator([loss], [1.0], list(problem.model.parameters()))
    return operator.matvec


def ggn(problem):
    spectrum = ggn_spectrum(problem.model, F.cross_entropy, problem.data, max_rows=None)
    return {"lambda_max": spectrum.lambda_max().value, "trace": spectrum.trace().value}


def counts(problem, eps):
    spectrum = ggn_spectrum(problem.model, F.cross_entropy, problem.data, max_rows=None)
    count = spectrum.epsilon_rank(eps, relative=True)
    return {"lambda_max": spectrum.lambda_max().value, "count": count.value}


PEER = Peer("lightning_plasticity", "lightning-plasticity", hessian, product, ggn, counts)
