"""ViViT: the exact GGN spectrum through its Gram matrix, inside one BackPACK backward pass.

Version 1.0.0 calls ``Tensor.symeig``, which torch has removed; the shim below is the documented replacement.
"""

import torch
from backpack import backpack, extend
from torch import nn
from vivit.linalg.eigvalsh import EigvalshComputation

from benchmarks.peers.adapters import NotApplicableError, Peer

MAX_BYTES = 8 * 2**30


def symeig(matrix, eigenvectors=False, upper=True):
    """The removed method."""
    uplo = "U" if upper else "L"
    if eigenvectors:
        return torch.linalg.eigh(matrix, UPLO=uplo)
    return torch.linalg.eigvalsh(matrix, UPLO=uplo), matrix.new_empty(0)


def _eigenvalues(problem):
    _check_memory(problem)
    torch.Tensor.symeig = symeig
    branches = any("residual" in name or "downsample" in name for name, _ in problem.model.named_modules())
    model, loss = extend(problem.model, use_converter=branches), extend(nn.CrossEntropyLoss())
    if branches:  # the converter leaves BatchNorm in train mode
        model = model.eval()
    computation = EigvalshComputation()
    groups = [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    value = loss(model(problem.inputs), problem.targets)
    with backpack(computation.get_extension(), extension_hook=computation.get_extension_hook(groups)):
        value.backward()
    return computation.get_result(groups[0])


def _check_memory(problem):
    """Convolutions are expanded to one gradient for each sample and class."""
    convolutions = [module for module in problem.model.modules() if isinstance(module, nn.Conv2d)]
    largest = max((module.weight.numel() for module in convolutions), default=0)
    needed = 4 * 10 * problem.num_samples * largest
    if needed > MAX_BYTES:
        raise NotApplicableError(f"one layer's rows take {needed / 2**30:.0f} GiB, limit {MAX_BYTES / 2**30:.0f} GiB")


def ggn(problem):
    values = _eigenvalues(problem)
    return {"lambda_max": float(values.max()), "trace": float(values.sum())}


def counts(problem, eps):
    values = _eigenvalues(problem)
    top = float(values.max())
    return {"lambda_max": top, "count": float((values > eps * top).sum())}


PEER = Peer(ggn=ggn, counts=counts)
