"""The limit of a Hessian-vector product on an MLP: the matrix products it cannot do without, and nothing else.

With forward and backward kept, a Linear layer needs V x, W Rx, V^T g, W^T Rg, Rg^T x and g^T Rx; the first layer only
V x and Rg^T x, since its input does not depend on parameters.
"""

import torch
from torch import nn

from benchmarks.peers.adapters import NotApplicableError, Peer


def product(problem):
    if not isinstance(problem.model, nn.Sequential) or any(isinstance(m, nn.Conv2d) for m in problem.model):
        raise NotApplicableError("only defined here for an MLP")
    layers = [layer for layer in problem.model if isinstance(layer, nn.Linear)]
    dtype, n = layers[0].weight.dtype, problem.num_samples
    inputs = [torch.randn(n, layer.in_features, dtype=dtype) for layer in layers]
    outputs = [torch.randn(n, layer.out_features, dtype=dtype) for layer in layers]
    weights = [layer.weight.detach() for layer in layers]

    def multiply(vector):
        for index, (x, g, w) in enumerate(zip(inputs, outputs, weights, strict=True)):
            _ = x @ w.T, g.T @ x
            if index:
                _ = x @ w.T, g @ w, g @ w, g.T @ x

    return multiply


PEER = Peer(product=product)
