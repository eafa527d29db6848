"""This package, by its public functions."""

from torch.nn import functional as F

from benchmarks.peers.adapters import NotApplicableError, Peer
from lightning_plasticity.curvature import HessianOperator, ggn_spectrum, hessian_spectrum
from lightning_plasticity.nn import undisturbed

DUAL_STEPS = 100


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


def dual(problem, eps):
    """Lanczos on the Gram matrix, the GGN's dual: a density and its counts without decomposing anything large."""
    about = {"max_rows": None, "method": "lanczos", "num_steps": DUAL_STEPS}
    try:
        spectrum = ggn_spectrum(problem.model, F.cross_entropy, problem.data, **about)
    except TypeError as error:
        raise NotApplicableError(f"this version has no method='lanczos' for the GGN: {error}") from error
    return {"lambda_max": spectrum.lambda_max().value, "count": spectrum.epsilon_rank(eps, relative=True).value}


PEER = Peer(hessian, product, ggn, counts)
DUAL = Peer(counts=dual)
