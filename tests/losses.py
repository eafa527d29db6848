"""Losses of every kind with data for them: what GGN and NTK are measured on."""

from __future__ import annotations

import torch
from problems import mlp
from torch import nn
from torch.nn import functional as F

N, C, T = 6, 4, 3
GENERATOR = torch.Generator().manual_seed(5)
LABELS = torch.tensor([0, 3, 1, 1, 2, 0])
POSITIONS = torch.tensor([[0, 1, 2], [3, 3, 0], [1, -100, 2], [0, 0, 0], [2, 1, 3], [-100, 1, 1]])
WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)
REAL = torch.randn(N, C, generator=GENERATOR, dtype=torch.float64)
SHARES = torch.rand(N, C, generator=GENERATOR, dtype=torch.float64)
PROBABILITIES = torch.softmax(REAL, 1)


def loss_of(function, **options):
    return lambda outputs, targets: function(outputs, targets, **options)


# name: (loss, targets, outputs have positions)
LOSSES = {
    "cross entropy": (loss_of(F.cross_entropy), LABELS, False),
    "module": (nn.CrossEntropyLoss(weight=WEIGHTS), LABELS, False),
    "class weights": (loss_of(F.cross_entropy, weight=WEIGHTS), LABELS, False),
    "ignore_index": (loss_of(F.cross_entropy, ignore_index=1), LABELS, False),
    "weights and ignore_index": (loss_of(F.cross_entropy, weight=WEIGHTS, ignore_index=3), LABELS, False),
    "smoothing": (loss_of(F.cross_entropy, label_smoothing=0.3), LABELS, False),
    "all options": (
        loss_of(F.cross_entropy, weight=WEIGHTS, ignore_index=0, label_smoothing=0.3, reduction="sum"),
        LABELS,
        False,
    ),
    "weights and smoothing": (loss_of(F.cross_entropy, weight=WEIGHTS, label_smoothing=0.3), LABELS, False),
    "sum": (loss_of(F.cross_entropy, reduction="sum"), LABELS, False),
    "probabilities": (loss_of(F.cross_entropy), PROBABILITIES, False),
    "probabilities, weights, smoothing": (
        loss_of(F.cross_entropy, weight=WEIGHTS, label_smoothing=0.2),
        PROBABILITIES,
        False,
    ),
    "shares that do not sum to one": (loss_of(F.cross_entropy), SHARES, False),
    "positions": (loss_of(F.cross_entropy), POSITIONS, True),
    "positions, weights": (loss_of(F.cross_entropy, weight=WEIGHTS), POSITIONS, True),
    "positions, sum": (loss_of(F.cross_entropy, reduction="sum", label_smoothing=0.1), POSITIONS, True),
    "all ignored, sum": (loss_of(F.cross_entropy, reduction="sum", ignore_index=1), torch.ones_like(LABELS), False),
    "none, then mean": (lambda o, t: F.cross_entropy(o, t, reduction="none").mean(), LABELS, False),
    "none, then sum": (lambda o, t: F.cross_entropy(o, t, reduction="none").sum(), LABELS, False),
    "weights, none, then mean": (
        lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS, reduction="none").mean(),
        LABELS,
        False,
    ),
    "ignored, none, then mean over the rest": (
        lambda o, t: F.cross_entropy(o, t, reduction="none").sum() / (t >= 0).sum(),
        POSITIONS,
        True,
    ),
    "ignored, none, then mean over all": (
        lambda o, t: F.cross_entropy(o, t, reduction="none").mean(),
        POSITIONS,
        True,
    ),
    "scaled": (lambda o, t: 0.3 * F.cross_entropy(o, t), LABELS, False),
    "two terms": (lambda o, t: F.cross_entropy(o, t) + 0.1 * F.mse_loss(o, o.new_zeros(o.shape)), LABELS, False),
    "nll": (lambda o, t: F.nll_loss(torch.log_softmax(o, 1), t), LABELS, False),
    "nll, weights": (lambda o, t: F.nll_loss(torch.log_softmax(o, 1), t, weight=WEIGHTS), LABELS, False),
    "mse": (loss_of(F.mse_loss), REAL, False),
    "mse, sum": (loss_of(F.mse_loss, reduction="sum"), REAL, False),
    "mse, weights": (loss_of(F.mse_loss, weight=SHARES), REAL, False),
    "bce": (loss_of(F.binary_cross_entropy_with_logits), SHARES, False),
    "bce, options": (
        loss_of(F.binary_cross_entropy_with_logits, pos_weight=2 * WEIGHTS, weight=SHARES + 0.1),
        SHARES,
        False,
    ),
    "bce, sum": (loss_of(F.binary_cross_entropy_with_logits, weight=WEIGHTS, reduction="sum"), SHARES, False),
    "huber": (loss_of(F.huber_loss, delta=0.7), REAL, False),
    "smooth l1": (loss_of(F.smooth_l1_loss), REAL, False),
    "poisson": (loss_of(F.poisson_nll_loss), SHARES, False),
    "gaussian": (lambda o, t: F.gaussian_nll_loss(o, t, torch.full_like(o, 0.3)), REAL, False),
    "pseudo-huber": (lambda o, t: (1 + (o - t) ** 2).sqrt().mean(), REAL, False),
    "couples outputs": (lambda o, t: (o.sum(1) - t.sum(1)).square().mean() + o[:, 0].exp().mean(), REAL, False),
    "by hand": (lambda o, t: torch.logsumexp(o, 1).mean() - (o * t).sum(1).mean(), PROBABILITIES, False),
}


class Positions(nn.Module):
    """Logits of shape (N, C, T)."""

    def forward(self, x):
        return x.reshape(len(x), C, T)


def problem(name):
    loss_fn, targets, positions = LOSSES[name]
    net = mlp(5, 6, C * T if positions else C)
    net = nn.Sequential(*net, Positions()) if positions else net
    inputs = torch.randn(N, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return net, loss_fn, (inputs, targets)
