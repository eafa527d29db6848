"""BackPACK: the exact GGN spectrum from explicit rows (``SqrtGGNExact``) and their Gram matrix."""

import torch
from backpack import backpack, extend
from backpack.extensions import SqrtGGNExact
from torch import nn

from benchmarks.peers.adapters import NotApplicableError, Peer

MAX_BYTES = 8 * 2**30


def ggn(problem):
    needed = 4 * 10 * problem.num_samples * problem.num_params
    if needed > MAX_BYTES:
        raise NotApplicableError(f"its rows take {needed / 2**30:.0f} GiB, limit {MAX_BYTES / 2**30:.0f} GiB")
    model, loss = extend(problem.model), extend(nn.CrossEntropyLoss())
    value = loss(model(problem.inputs), problem.targets)
    with backpack(SqrtGGNExact()):
        value.backward()
    gram = 0.0
    for parameter in model.parameters():
        rows = parameter.sqrt_ggn_exact.flatten(end_dim=1).flatten(start_dim=1)  # (C N, p)
        gram = gram + rows @ rows.T
        del parameter.sqrt_ggn_exact
    values = torch.linalg.eigvalsh(gram)
    return {"lambda_max": float(values.max()), "trace": float(values.sum())}


PEER = Peer(ggn=ggn)
