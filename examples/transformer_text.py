"""A small causal transformer on text whose alphabet changes: monitors on the whole, on the blocks, and rank by block.

    python examples/transformer_text.py

The text is what ships with Python: the Zen of Python and the docstrings of modules of its standard library. Each task
writes it in another alphabet, a random permutation of the characters: the structure of the language stays, what was
learnt of single characters is wrong.

About a minute of one core. Expect (seed 0, torch 2.14, Python 3.11, whose docstrings differ a little from other
versions'; a guess has a loss of 3.37):

- The loss of a task starts at 5.4 to 6.4, worse than a guess, since the network is sure of the old alphabet. It ends at
  2.11 in the first task, at 1.93, 1.88, 1.80, 1.77 and 1.84 in the next: what is learnt helps, and nothing is lost yet.
- GGN eigenvalues above 0.01 at the start of a task: 437 to 719 in the fresh network, 705 to 1526 at the second task,
  1352 to 3408 at the last. In the blocks alone 222 to 406, 527 to 1165, 1167 to 2866: never more than in the whole.
- The largest eigenvalue, which is known sharply: 1.2, then 15 to 29. That of the Hessian: 1.7, then 13 to 16.
- Effective rank of the blocks' outputs, at most 32: 22 to 25 throughout. A network that loses its ability to learn is
  in ``plain_module.ipynb``.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import inspect
import logging
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plasticity import FeatureRankMonitor, HessianSpectrumMonitor
from lightning_plasticity.streams import DatasetStream

ALPHABET = " abcdefghijklmnopqrstuvwxyz.,"
MODULES = ("argparse", "collections", "decimal", "difflib", "functools", "heapq", "json", "random", "statistics")
LENGTH, PADDING = 32, -1


def text() -> str:
    """Prose of the standard library, in lower case, with the characters of the alphabet only."""
    with contextlib.redirect_stdout(None):  # the module prints itself
        zen = codecs.decode(importlib.import_module("this").s, "rot13")
    modules = [importlib.import_module(name) for name in MODULES]
    members = [member for module in modules for _, member in sorted(vars(module).items()) if callable(member)]
    written = "\n".join([zen, *(inspect.getdoc(part) or "" for part in [*modules, *members])]).lower()
    return " ".join("".join(character if character in ALPHABET else " " for character in written).split())


def sequences() -> tuple[Tensor, Tensor]:
    """(N, LENGTH + 1) characters as numbers, and for each sequence how many of them count; the rest is padding."""
    numbers = torch.tensor([ALPHABET.index(character) for character in text()])
    whole = numbers[: len(numbers) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    lengths = torch.randint(LENGTH // 2, LENGTH + 2, (len(whole),), generator=torch.Generator().manual_seed(0))
    return whole, lengths


def another_alphabet(tokens: Tensor, lengths: Tensor, task: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The change that makes a task: every character becomes another one."""
    return torch.randperm(len(ALPHABET), generator=generator)[tokens], lengths


class Transformer(L.LightningModule):
    """Embedding, two blocks of torch's own, a head; trained to tell the next character."""

    def __init__(self, width: int = 32, heads: int = 2, blocks: int = 2, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.embedding = nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET))
        self.losses: list[float] = []

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) characters -> (N, T, C) logits of the next ones."""
        hidden = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return self.head(self.norm(hidden))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the next character, a mean over those that are no padding."""
        tokens, lengths = batch
        places = torch.arange(1, tokens.shape[1], device=tokens.device)
        targets = tokens[:, 1:].masked_fill(places >= lengths[:, None], PADDING)
        # Classes in dimension 1, as (N, C, T): the spectrum then counts sequences as samples, and layers keep their
        # shortcuts. With logits.flatten(0, 1) every number is the same; samples are then the characters.
        loss = F.cross_entropy(self(tokens[:, :-1]).transpose(1, 2), targets, ignore_index=PADDING)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, new for each task."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def main(num_tasks: int = 6, epochs_per_task: int = 4, max_steps: int = -1) -> None:
    """Train and print; ``max_steps`` cuts each task short."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(0, verbose=False)
    stream = DatasetStream(sequences(), another_alphabet, num_tasks, epochs_per_task, batch_size=32)
    net, started = Transformer(), time.perf_counter()
    # 64 x 32 x 28 rows are too many for an exact GGN: it is estimated, with an interval. No bound on the time, so that
    # the numbers are the same on every machine; a measurement takes some seconds.
    settings: dict[str, Any] = {"when": "start", "num_steps": 40, "max_seconds": None, "max_memory": 2**30}
    settings["probe_samples"] = 64 if max_steps < 0 else 8
    spectra = HessianSpectrumMonitor(**settings)
    blocks = HessianSpectrumMonitor("ggn", **settings, params="blocks.*", name="blocks")
    features = FeatureRankMonitor(when="start", probe_samples=256)
    print(f"{len(stream.task_data(0)[0])} sequences; loss of a guess {torch.tensor(len(ALPHABET)).log():.2f}")
    for task in range(num_tasks):
        stream.task_id, net.losses = task, []
        trainer = L.Trainer(
            max_epochs=epochs_per_task,
            max_steps=max_steps,
            accelerator="cpu",
            callbacks=[spectra, blocks, features],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(net, datamodule=stream)
        whole, part, ranks = (monitor.records[-1].values for monitor in (spectra, blocks, features))
        count, own = whole["plasticity/ggn/eps_rank_0.01"], part["plasticity/blocks/ggn/eps_rank_0.01"]
        largest = [whole[f"plasticity/{matrix}/lambda_max"].value for matrix in ("ggn", "hessian")]
        by_block = {key.split("/")[-1]: value.value for key, value in ranks.items() if "/effective_rank/" in key}
        end = net.losses[-20:]
        print(
            f"task {task}: loss {net.losses[0]:.2f} -> {sum(end) / len(end):.2f}; "
            f"GGN eigenvalues > 0.01: {count.lower:.0f} to {count.upper:.0f}, "
            f"in the blocks alone {own.lower:.0f} to {own.upper:.0f}; "
            f"largest {largest[0]:.1f}, of the Hessian {largest[1]:.1f}; "
            f"effective rank {', '.join(f'{name} {rank:.1f}' for name, rank in by_block.items())}",
            flush=True,
        )
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
