"""PyHessian: its ``density`` on one batch (the graph of the gradient is kept) and on a loader (made anew every time).

Version 0.1 calls ``torch.eig``, which torch has removed; the shim below is what its later code does.
"""

import torch
from pyhessian import hessian as PyHessian  # noqa: N812
from pyhessian.utils import hessian_vector_product
from torch.nn import functional as F

from benchmarks.peers.adapters import Peer

LOADER_BATCHES = 5
COUNT_STEPS = 100


def eig(matrix, eigenvectors=False):
    """The removed function on a symmetric matrix: eigenvalues as (n, 2), real and imaginary part."""
    values, vectors = torch.linalg.eig(matrix)
    return torch.stack([values.real, values.imag], dim=1), vectors.real


def _kept(problem):
    _without_gradients(problem)
    return PyHessian(problem.model, F.cross_entropy, data=problem.data, cuda=False)


def _loader(problem):
    _without_gradients(problem)
    size = -(-problem.num_samples // LOADER_BATCHES)
    batches = list(zip(problem.inputs.split(size), problem.targets.split(size), strict=True))
    return PyHessian(problem.model, F.cross_entropy, dataloader=batches, cuda=False)


def _without_gradients(problem):
    """It adds to what is in ``.grad`` and leaves its own there."""
    for parameter in problem.model.parameters():
        parameter.grad = None


def _density(measure, num_steps):
    torch.eig = eig
    nodes, weights = measure.density(iter=num_steps, n_v=1)
    return torch.tensor(nodes[0]), torch.tensor(weights[0])


def _hessian(measure, num_steps):
    return {"lambda_max": float(_density(measure, num_steps)[0].max())}


def _counts(problem, eps):
    nodes, weights = _density(_kept(problem), COUNT_STEPS)
    top = float(nodes.max())
    return {"lambda_max": top, "count": float(problem.num_params * weights[nodes.abs() > eps * top].sum())}


def _split(measure, vector):
    parts = vector.split([parameter.numel() for parameter in measure.params])
    return [part.view_as(parameter) for part, parameter in zip(parts, measure.params, strict=True)]


def _kept_product(problem):
    measure = _kept(problem)
    return lambda vector: hessian_vector_product(measure.gradsH, measure.params, _split(measure, vector))


def _loader_product(problem):
    measure = _loader(problem)
    return lambda vector: measure.dataloader_hv_product(_split(measure, vector))[1]


KEPT = Peer(
    hessian=lambda problem, num_steps: _hessian(_kept(problem), num_steps),
    product=_kept_product,
    counts=_counts,
)
LOADER = Peer(
    hessian=lambda problem, num_steps: _hessian(_loader(problem), num_steps),
    product=_loader_product,
)
