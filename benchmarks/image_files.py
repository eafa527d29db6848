"""A hundred classes of real 32 x 32 images in the formats of CIFAR-100 and Continual ImageNet, made of MNIST's digits.

Class k is digit k % 10 under the symmetry k // 10 of the square (eight of them), then inverted. For machines without
the data sets: the loading code and protocols are the real ones, the numbers are not those of photographs.

Run: python -m benchmarks.image_files --mnist data --out data/made --per-class 60
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightning_plasticity.streams.mnist import load_images

TEST = 20  # images of a class in CIFAR's test file
IMAGES = 620  # of a class of Continual ImageNet, of which 600 are for training


def made_class(images: np.ndarray, k: int) -> np.ndarray:
    """(N, 32, 32) of class k out of (N, 28, 28) of its digit, uint8."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    symmetry = k // 10 % 8
    turned = np.rot90(padded, symmetry % 4, axes=(1, 2))
    turned = turned.transpose(0, 2, 1) if symmetry >= 4 else turned
    return np.ascontiguousarray(255 - turned if k // 80 else turned)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", default="data", help="folder that holds MNIST/raw")
    parser.add_argument("--out", type=Path, default=Path("data/made"))
    parser.add_argument("--per-class", type=int, default=60, help="CIFAR training images of a class")
    given = parser.parse_args(arguments)
    images, labels = load_images("MNIST", given.mnist, True, False, False)
    pixels = (images[:, 0] * 255).round().byte().numpy()
    random = np.random.default_rng(0)
    digits = [random.permutation(pixels[labels.numpy() == digit]) for digit in range(10)]
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    folder, classes = given.out / "cifar-100-python", given.out / "classes"
    folder.mkdir(parents=True, exist_ok=True)
    classes.mkdir(exist_ok=True)
    for k in range(100):
        own = made_class(digits[k % 10], k)
        coloured = np.repeat(own[:, None], 3, axis=1)
        start = (len(own) - IMAGES) // 9 * (k // 10)
        np.save(classes / f"{k}.npy", coloured[start : start + IMAGES])
        parts["train"].append(coloured[start : start + given.per_class])
        parts["test"].append(coloured[start + given.per_class : start + given.per_class + TEST])
    for part, arrays in parts.items():
        fine = np.repeat(np.arange(100), len(arrays[0])).tolist()
        data = {"data": np.concatenate(arrays).reshape(-1, 3072), "fine_labels": fine}
        (folder / part).write_bytes(pickle.dumps(data))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class{k}" for k in range(100)]}))


if __name__ == "__main__":
    main()
