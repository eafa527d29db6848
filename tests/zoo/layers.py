"""Layers of every kind: custom derivatives, recurrence, attention, parametrisations, checkpointing, normalisation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from zoo.base import (
    CLASSES,
    HIDDEN,
    INPUTS,
    Expectation,
    Kind,
    Samples,
    Small,
    by_net,
    loader,
    mlp,
    pairs,
    points,
    under_nll,
)  # fmt: skip

NOT_SYMMETRIC = "not symmetric .*double backward is wrong"
WIDTH = 4


class Cube(torch.autograd.Function):
    """x^3, with a backward pass that can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grads[0]


class CubeOnce(Cube):
    """The same, but nobody may differentiate it twice."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return Cube.backward(ctx, *grads)


class UnitWrong(torch.autograd.Function):
    """x / |x| with the right first derivative, and a second one that takes the norm for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = x.norm(dim=1, keepdim=True)
        ctx.save_for_backward(x)
        ctx.norm = norm
        return x / norm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,), norm = ctx.saved_tensors, ctx.norm
        return (grads[0] - x * (x * grads[0]).sum(1, keepdim=True) / norm**2) / norm


class Applied(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, CLASSES), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def normed(module: Any, batch: Any) -> Any:
    hidden = module.net.first(batch[0])
    return under_nll(module.net.last(hidden / hidden.square().sum(1, keepdim=True).sqrt()), batch[1])


def cubed(module: Any, batch: Any) -> Any:
    return under_nll(module.net.last(module.net.first(batch[0]) ** 3), batch[1])


# ---- sequences -----------------------------------------------------------------------------------------------------


def sequences() -> list[Any]:
    """Two tasks of sequences of one to four steps, padded, with their lengths."""

    def collate(samples: list[Any]) -> Any:
        x, y = zip(*samples, strict=True)
        return pad_sequence(list(x), batch_first=True), torch.tensor([len(part) for part in x]), torch.stack(y)

    def task(seed: int) -> Any:
        x, y = points(seed)
        samples = [(part[: 1 + index % 4, None].repeat(1, 2), y[index]) for index, part in enumerate(x)]
        return loader(Samples(samples), collate_fn=collate)

    return [task(0), task(1)]


class Packed(Small):
    """A recurrent network on packed sequences."""

    def __init__(self, kind: Any = nn.LSTM) -> None:
        super().__init__(nn.Linear(HIDDEN, CLASSES))
        self.rnn = kind(2, HIDDEN, batch_first=True)

    def loss(self, batch: Any) -> Tensor:
        x, lengths, y = batch
        out, _ = self.rnn(pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False))
        out, _ = pad_packed_sequence(out, batch_first=True)
        return F.cross_entropy(self.net(out[torch.arange(len(y)), lengths - 1]), y)


class PackedGRU(Packed):
    def __init__(self) -> None:
        super().__init__(nn.GRU)


def one_by_one(module: Any, batch: Any) -> Any:
    x, lengths, y = batch
    last = [module.rnn(row[:length])[0][-1] for row, length in zip(x, lengths.tolist(), strict=True)]
    return under_nll(module.net(torch.stack(last)), y)


class Positions(nn.Module):
    """Four numbers as four tokens of four features, through attention of some kind, and their mean through a head."""

    def __init__(self, attend: nn.Module) -> None:
        super().__init__()
        self.embed, self.attend, self.head = nn.Linear(1, WIDTH), attend, nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(self.embed(x[..., None])).mean(1))


class Scaled(nn.Module):
    """Fused attention; ``by_hand`` writes it out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.by_hand = nn.Linear(WIDTH, 3 * WIDTH), False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        out = written_out(q, k, v) if self.by_hand else F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)
        self.by_hand = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.by_hand:
            return self.attention(x, x, x, need_weights=False)[0]
        a = self.attention
        parts = F.linear(x, a.in_proj_weight, a.in_proj_bias).chunk(3, -1)
        out = written_out(*(part.unflatten(-1, (2, 2)).transpose(1, 2) for part in parts))
        return a.out_proj(out.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 5, dropout=0.1, activation="gelu", batch_first=True)
        self.by_hand = False

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not self.by_hand:
            return layer(x)
        a = layer.self_attn
        parts = F.linear(x, a.in_proj_weight, a.in_proj_bias).chunk(3, -1)
        out = written_out(*(part.unflatten(-1, (2, 2)).transpose(1, 2) for part in parts))
        x = layer.norm1(x + a.out_proj(out.transpose(1, 2).flatten(2)))
        return layer.norm2(x + layer.linear2(F.gelu(layer.linear1(x))))


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1) @ v


def attention_by_hand(module: Any, batch: Any) -> Any:
    module.net.attend.by_hand = True
    return by_net(module, batch)


class Tokens(Small):
    """A language model: an embedding tied to the head, cross-entropy at every position."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__(nn.Linear(HIDDEN, 5, bias=False))
        self.embed = nn.Embedding(5, HIDDEN, sparse=sparse)
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        if not sparse:
            self.net.weight = self.embed.weight

    def logits(self, tokens: Tensor) -> Tensor:
        return self.net(torch.tanh(self.mix(self.embed(tokens))))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.logits(batch[:, :-1]).transpose(1, 2), batch[:, 1:])


class SparseTokens(Tokens):
    def __init__(self) -> None:
        super().__init__(sparse=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def token_rows() -> list[Any]:
    rows = [torch.randint(5, (12, 4), generator=torch.Generator().manual_seed(task)) for task in range(2)]
    return [loader(Samples(list(part))) for part in rows]


def next_token(module: Any, batch: Tensor) -> Any:
    module.embed.sparse = False
    return under_nll(module.logits(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


# ---- parametrisations, checkpointing, normalisation ----------------------------------------------------------------


def weight_normed() -> nn.Module:
    net = mlp()
    parametrizations.weight_norm(net[0])
    return net


def old_weight_normed() -> nn.Module:
    net = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(net[0])
    return net


def spectral_normed() -> nn.Module:
    net = mlp()
    parametrizations.spectral_norm(net[0])
    return net


def by_weight_norm(module: Any, batch: Any) -> Any:
    layer = module.net[0]
    if hasattr(layer, "parametrizations"):
        scale, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    else:
        scale, direction = layer.weight_g, layer.weight_v
    weight = scale * direction / direction.square().sum(1, keepdim=True).sqrt()
    return under_nll(module.net[2](torch.tanh(batch[0] @ weight.T + layer.bias)), batch[1])


def by_spectral_norm(module: Any, batch: Any) -> Any:
    """One power iteration from the kept vectors, which are constants of the derivative."""
    layer = module.net[0]
    norm, weight = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    with torch.no_grad():
        u = F.normalize(weight @ norm._v, dim=0)
        v = F.normalize(weight.T @ u, dim=0)
    hidden = torch.tanh(batch[0] @ (weight / (u @ weight @ v)).T + layer.bias)
    return under_nll(module.net[2](hidden), batch[1])


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = mlp(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[0](x)
        return checkpoint(self.net[1:], hidden, use_reentrant=self.reentrant)


class InSegments(Checkpointed):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.net, 2, x.requires_grad_(True), use_reentrant=self.reentrant)


def unchecked(module: Any, batch: Any) -> Any:
    return under_nll(module.net.net(batch[0]), batch[1])


def pictures() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3), nn.SiLU(inplace=True),
        nn.Dropout2d(0.3), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(3, CLASSES),
    )  # fmt: skip


def by_eval(module: Any, batch: Any) -> Any:
    return by_net(module.eval(), batch)


class Margin(Small):
    """A loss that torch cannot differentiate twice."""

    def loss(self, batch: Any) -> Tensor:
        return nn.MultiMarginLoss()(self.net(batch[0]), batch[1])


class Critic(Small):
    """A loss that is linear in what the network puts out."""

    def loss(self, batch: Any) -> Tensor:
        return self.net(batch[0]).mean()


def small(make: Callable[[], nn.Module]) -> Callable[[], Small]:
    return lambda: Small(make())


UNKNOWN = {"ggn": "calls no loss function that is known"}

KINDS = [
    Kind("function, right", small(lambda: Applied(Cube.apply)), pairs, Expectation(cubed)),
    Kind(
        "function, once",
        small(lambda: Applied(CubeOnce.apply)),
        pairs,
        Expectation(cubed, warned={"hessian": NOT_SYMMETRIC}),
    ),
    Kind(
        "function, wrong",
        small(lambda: Applied(UnitWrong.apply)),
        pairs,
        Expectation(normed, warned={"hessian": NOT_SYMMETRIC}),
    ),
    Kind("packed LSTM", Packed, sequences, Expectation(one_by_one)),
    Kind("packed GRU", PackedGRU, sequences, Expectation(one_by_one)),
    Kind("fused attention", small(lambda: Positions(Scaled())), pairs, Expectation(attention_by_hand)),
    Kind("multi-head attention", small(lambda: Positions(MultiHead())), pairs, Expectation(attention_by_hand)),
    Kind("transformer layer", small(lambda: Positions(Encoder())), pairs, Expectation(attention_by_hand)),
    Kind("tied tokens", Tokens, token_rows, Expectation(next_token)),
    Kind("sparse embedding", SparseTokens, token_rows, Expectation(next_token)),
    Kind("weight norm", small(weight_normed), pairs, Expectation(by_weight_norm)),
    Kind("old weight norm", small(old_weight_normed), pairs, Expectation(by_weight_norm)),
    Kind("spectral norm", small(spectral_normed), pairs, Expectation(by_spectral_norm)),
    Kind("checkpoint", small(lambda: Checkpointed(False)), pairs, Expectation(unchecked)),
    Kind("checkpoint, reentrant", small(lambda: Checkpointed(True)), pairs, Expectation(unchecked)),
    Kind("checkpoint, reentrant segments", small(lambda: InSegments(True)), pairs, Expectation(unchecked)),
    Kind("convolution, BatchNorm, dropout", small(pictures), pairs, Expectation(by_eval)),
    Kind(
        "margin loss",
        Margin,
        pairs,
        Expectation(
            warned={"ggn": "calls no loss function", "hessian": "cannot be differentiated twice: .*multi_margin_loss"}
        ),
    ),
    Kind(
        "linear loss",
        Critic,
        pairs,
        Expectation(lambda module, batch: (module.net(batch[0]), lambda out: out.mean()), warned=UNKNOWN),
    ),
]
