"""hessian-eigenthings: its spectral density (one run), of the Hessian and of the GGN."""

from hessian_eigenthings import (
    GGNOperator,
    HessianOperator,
    spectral_density,
    supervised_forward,
    supervised_loss,
    supervised_loss_of_output,
)
from torch.nn import functional as F

from benchmarks.peers.adapters import Peer

GGN_STEPS = 100
GRID = 100  # points of the curve it draws, which takes longer than the run on tiny networks


def _operator(problem):
    return HessianOperator(problem.model, [problem.data], supervised_loss(F.cross_entropy))


def hessian(problem, num_steps):
    result = spectral_density(_operator(problem), num_runs=1, lanczos_steps=num_steps, num_grid_points=GRID, seed=0)
    return {"lambda_max": float(result.raw_eigenvalues.max())}


def product(problem):
    return _operator(problem).matvec


def counts(problem, eps):
    operator = GGNOperator(
        problem.model, [problem.data], supervised_forward, supervised_loss_of_output(F.cross_entropy)
    )
    result = spectral_density(operator, num_runs=1, lanczos_steps=GGN_STEPS, num_grid_points=GRID, seed=0)
    nodes, weights = result.raw_eigenvalues[0], result.raw_weights[0]
    top = float(nodes.max())
    return {"lambda_max": top, "count": float(problem.num_params * weights[nodes > eps * top].sum())}


PEER = Peer(hessian=hessian, product=product, counts=counts)
