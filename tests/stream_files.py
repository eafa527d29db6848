"""Small files in the formats of MNIST, CIFAR-100 and Continual ImageNet, generated."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np


def write_mnist(root: Path, name: str, train: int, test: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """IDX files as torchvision reads them; returns the training images and labels."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    written = []
    for part, count in (("train", train), ("t10k", test)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.permutation(np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">IIII", 0x00000803, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x00000801, count) + labels.tobytes())
        written.append((images, labels))
    return written[0]


def write_cifar100(root: Path, per_class: int, test_per_class: int, seed: int = 0) -> np.ndarray:
    """Pickles as torchvision reads them; returns the training images as (N, 3, 32, 32)."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    written = []
    for part, count in (("train", per_class), ("test", test_per_class)):
        data = random.integers(0, 256, (100 * count, 3072), dtype=np.uint8)
        labels = random.permutation(np.repeat(np.arange(100), count))
        (folder / part).write_bytes(pickle.dumps({"data": data, "fine_labels": labels.tolist()}))
        written.append(data.reshape(-1, 3, 32, 32))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class{k}" for k in range(100)]}))
    return written[0]


def write_imagenet(root: Path, classes: int, images: int = 602) -> None:
    """One array of images by class; each image is filled with its class and its index."""
    root.mkdir(parents=True)
    for label in range(classes):
        array = np.zeros((images, 3, 32, 32), dtype=np.uint8)
        array[:, 0] = label
        array[:, 1] = (np.arange(images) % 256)[:, None, None]
        np.save(root / f"{label}.npy", array)
