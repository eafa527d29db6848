"""A residual network on images whose labels change: monitors with settings for convolutions, with and without L2-ER.

    python examples/resnet_images.py                      # no files needed
    python examples/resnet_images.py --root data          # incremental CIFAR-100 from data/cifar-100-python

Without ``--root`` the images are 520 patches, 3 x 32 x 32, of the two colour photographs that scikit-learn ships; each
task takes 200 of them and gives them new random labels out of ten: only the ability to learn counts.

Both networks take two and a half minutes of one core. Expect (seed 0, torch 2.14, the start of each task):

- GGN eigenvalues above 0.01: 10 in the fresh network, whose logits are small; about 500 of at most 576 (64 samples,
  9 rows each) from the second task on, in both networks.
- The largest rises from 0.15 to about 2500: the network is sure of its old labels. The count is exact all the same, and
  has an interval of some eigenvalues because float32 knows them to a millionth of the largest only.
- Accuracy, a mean over the 25 epochs of a task, rises from 0.42 to 0.74 without L2-ER and to 0.73 with it. With
  BatchNorm, in eight tasks of 250 steps, nothing is lost yet, and a remedy has nothing to mend. A network that does
  lose its ability to learn is in ``plain_module.ipynb``: no BatchNorm, 14 tasks of 750 steps.
- Effective rank at the last task, of at most 64: of the last block 38.9 without L2-ER and 40.8 with it, of what the
  head reads (its mean over positions) 22.6 and 25.0. L2-ER acts on these two, gently, as its strength is.
"""

from __future__ import annotations

import argparse
import logging
import time

import lightning as L
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plasticity import FeatureRankMonitor, HessianSpectrumMonitor, Regularization
from lightning_plasticity.streams import DatasetStream, IncrementalCIFAR100, RandomLabels


class Block(nn.Module):
    """Two convolutions and a way around them (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        return F.relu(self.body(images) + self.skip(images))


class ResNet(L.LightningModule):
    """A stem and three stages; ``torchvision.models.resnet18(num_classes=...)`` as ``self.net`` works the same."""

    def __init__(self, num_classes: int, width: int = 16, blocks_per_stage: int = 1, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        blocks, channels = [], width
        for wider in (width, 2 * width, 4 * width):
            blocks.append(Block(channels, wider, stride=2))
            blocks += [Block(wider, wider, stride=1) for _ in range(blocks_per_stage - 1)]
            channels = wider
        self.net = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, num_classes),
        )
        self.correct: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        logits = self.net(images)
        self.correct.append(float((logits.argmax(1) == labels).float().mean()))
        return F.cross_entropy(logits, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, new for each task."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def patches(size: int = 32) -> tuple[Tensor, Tensor]:
    """(520, 3, size, size) standardised patches of two photographs, and ten classes as labels, to be replaced."""
    photos = torch.stack([torch.from_numpy(photo.copy()) for photo in load_sample_images().images])
    photos = photos.permute(0, 3, 1, 2).float() / 255.0
    cut = photos.unfold(2, size, size).unfold(3, size, size)  # (2, 3, rows, columns, size, size)
    images = cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, size, size)
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    return images, torch.arange(len(images)) % 10


def train(regularised: bool, root: str | None, num_tasks: int, epochs_per_task: int, max_steps: int) -> None:
    """One network through the whole stream."""
    L.seed_everything(0, verbose=False)
    stream: DatasetStream | IncrementalCIFAR100
    if root is None:
        stream = DatasetStream(
            patches(), RandomLabels(), num_tasks, epochs_per_task, samples_per_task=200, batch_size=20
        )
        net = ResNet(num_classes=10)
    else:
        stream = IncrementalCIFAR100(root, num_tasks=num_tasks, epochs_per_task=epochs_per_task)
        net = ResNet(num_classes=100, width=64, blocks_per_stage=2)
    spectra = HessianSpectrumMonitor(
        quantities=("ggn",),  # the Hessian of a convolutional network takes many times as long
        when="start",
        probe_samples=64
        if max_steps < 0
        else 16,  # 64 x 9 rows: an exact spectrum. With 100 classes it is estimated, and has an interval
        max_seconds=None,  # always all samples: within a time bound the count depends on how busy the machine is
        max_memory=2**30,  # the default, four training steps of 20 images, would leave 16 samples
    )
    features = FeatureRankMonitor(when="start", probe_samples=256, conv="positions")
    callbacks: list[L.Callback] = [spectra, features]
    if regularised:
        # Far gentler than for an MLP, and on the last two hidden layers only: see docs/how-to/l2er.md.
        callbacks.append(Regularization.l2er(rank_strength=1e-3, rank_layers=2, l2_strength=1e-4))
    print("with L2-ER" if regularised else "plain")
    print("task  accuracy  GGN eigenvalues > 0.01   largest  effective rank: three blocks, what the head reads")
    for task in range(num_tasks):
        stream.task_id, net.correct = task, []
        trainer = L.Trainer(
            max_epochs=epochs_per_task,
            max_steps=max_steps,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(net, datamodule=stream)
        found, hidden = spectra.records[-1].values, features.records[-1].values
        count, largest = found["plasticity/ggn/eps_rank_0.01"], found["plasticity/ggn/lambda_max"]
        ranks = [number.value for key, number in hidden.items() if "/features/effective_rank/" in key]
        accuracy = sum(net.correct) / len(net.correct)
        interval = "" if count.lower == count.upper else f" ({count.lower:.0f} to {count.upper:.0f})"
        print(
            f"{task:4} {accuracy:9.3f} {count.value:12.0f}{interval:14} {largest.value:9.2f}  "
            + " ".join(f"{rank:.1f}" for rank in ranks),
            flush=True,
        )


def main(root: str | None = None, num_tasks: int = 8, epochs_per_task: int = 25, max_steps: int = -1) -> None:
    """Both networks on the same stream; ``max_steps`` cuts each task short."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for regularised in (False, True):
        started = time.perf_counter()
        train(regularised, root, num_tasks, epochs_per_task, max_steps)
        print(f"{time.perf_counter() - started:.0f} s\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder that holds cifar-100-python; without it packaged photographs")
    parser.add_argument("--num-tasks", type=int, default=8)
    parser.add_argument("--epochs-per-task", type=int, default=25)
    main(**vars(parser.parse_args()))
