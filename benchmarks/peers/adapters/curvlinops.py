"""curvlinops: its Lanczos run (without reorthogonalisation, as it does), of the Hessian and of the GGN.

The eigenvalue bounds that its density function finds first, by another Lanczos run, are left out.
"""

import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from curvlinops.papyan2020traces.spectrum import fast_lanczos
from torch import nn

from benchmarks.peers.adapters import Peer

GGN_STEPS = 100


def _operator(kind, problem):
    parameters = [parameter for parameter in problem.model.parameters() if parameter.requires_grad]
    loss = nn.CrossEntropyLoss()
    return kind(problem.model, loss, parameters, [problem.data], check_deterministic=False)


def hessian(problem, num_steps):
    torch.manual_seed(0)
    nodes, _ = fast_lanczos(_operator(HessianLinearOperator, problem), num_steps)
    return {"lambda_max": float(nodes.max())}


def product(problem):
    operator = _operator(HessianLinearOperator, problem)
    return lambda vector: operator @ vector


def counts(problem, eps):
    torch.manual_seed(0)
    nodes, vectors = fast_lanczos(_operator(GGNLinearOperator, problem), GGN_STEPS)
    top = float(nodes.max())
    return {"lambda_max": top, "count": float(problem.num_params * vectors[0].square()[nodes > eps * top].sum())}


PEER = Peer(hessian=hessian, product=product, counts=counts)
