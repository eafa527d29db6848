"""Streams on files: MNIST, CIFAR-100 and Continual ImageNet, generated in the formats of the real ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stream_files import write_cifar100, write_imagenet, write_mnist

from lightning_plasticity.streams import (
    ContinualImageNet,
    IncrementalCIFAR100,
    PermutedFashionMNIST,
    PermutedMNIST,
    RandomLabelMNIST,
)
from lightning_plasticity.streams.cifar import DEVIATION, MEAN

torchvision = pytest.importorskip("torchvision")


@pytest.mark.parametrize(("stream", "name"), [(PermutedMNIST, "MNIST"), (PermutedFashionMNIST, "FashionMNIST")])
def test_permuted_mnist_reads_the_files(tmp_path, stream, name):
    images, labels = write_mnist(tmp_path, name, train=50, test=20)
    tasks = stream(str(tmp_path), num_tasks=3)
    inputs, targets = tasks.task_data(2)
    assert inputs.shape == (50, 784)
    assert np.array_equal(targets.numpy(), labels)
    assert np.array_equal(np.sort((inputs.numpy() * 255).round(), axis=1), np.sort(images.reshape(50, 784), axis=1))
    assert tasks.test_data(2)[0].shape == (20, 784)
    assert (tasks.batch_size, tasks.epochs_per_task) == (1, 1)
    assert stream(str(tmp_path), flat=False).task_data(0)[0].shape == (50, 1, 28, 28)


def test_random_label_mnist_keeps_the_images(tmp_path):
    write_mnist(tmp_path, "MNIST", train=500, test=10)
    tasks = RandomLabelMNIST(str(tmp_path), samples_per_task=400)
    first, second = tasks.task_data(0), tasks.task_data(1)
    assert first[0].shape == (400, 784)
    assert 0.02 < float((first[1] == second[1]).double().mean()) < 0.2
    assert tasks.test_data(0) is None


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="MNIST/raw"):
        PermutedMNIST(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="cifar-100-python"):
        IncrementalCIFAR100(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="0 class files"):
        ContinualImageNet(str(tmp_path))


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Generated files have other checksums than the real ones."""
    images = write_cifar100(tmp_path, per_class=60, test_per_class=2)
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    return str(tmp_path), images


def test_cifar_classes_arrive_a_few_at_a_time(cifar):
    root, images = cifar
    tasks = IncrementalCIFAR100(root, seed=3)
    for task in (0, 7, 19):
        inputs, targets = tasks.task_data(task)
        assert len(tasks.classes(task)) == 5 * (task + 1)
        assert set(targets.tolist()) == set(tasks.classes(task).tolist())
        assert inputs.shape == (60 * 5 * (task + 1), 3, 32, 32)
        assert tasks.test_data(task)[0].shape[0] == 2 * 5 * (task + 1)
    assert set(tasks.classes(3).tolist()) < set(tasks.classes(4).tolist())
    whole = tasks.task_data(19)[0]
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    assert np.array_equal(((whole * deviation + mean) * 255).round().numpy().astype(np.uint8), images)


def test_the_two_protocols_of_cifar(cifar):
    root, _ = cifar
    jax, dohare = IncrementalCIFAR100(root), IncrementalCIFAR100(root, protocol="dohare")
    assert (jax.batch_size, dohare.batch_size) == (100, 90)
    assert jax.validation_data(0) is None
    train, held_out = dohare.task_data(0), dohare.validation_data(0)
    assert (len(train[0]), len(held_out[0])) == (5 * 10, 5 * 50)
    assert len(torch.cat([train[0], held_out[0]]).flatten(1).unique(dim=0)) == 300  # no image is in both
    assert len(jax.val_dataloader().dataset) == 10
    assert len(dohare.val_dataloader().dataset) == 250
    plain = {image.numpy().tobytes() for image in jax.task_data(0)[0]}
    inputs, targets = next(iter(dohare.train_dataloader()))
    assert inputs.shape == (50, 3, 32, 32)
    assert targets.shape == (50,)
    assert sum(image.numpy().tobytes() in plain for image in inputs) < 10  # nearly all are augmented
    assert all(image.numpy().tobytes() in plain for image in next(iter(jax.train_dataloader()))[0])


def test_imagenet_tasks_are_pairs_of_classes_in_a_random_order(tmp_path):
    write_imagenet(tmp_path / "classes", classes=6)
    tasks = ContinualImageNet(str(tmp_path / "classes"))
    used = [tuple(tasks.classes(task)) for task in range(6)]
    assert sorted(name for pair in used[:3] for name in pair) == [str(k) for k in range(6)]
    assert sorted(name for pair in used[3:] for name in pair) == [str(k) for k in range(6)]
    assert used[:3] != used[3:]
    inputs, targets = tasks.task_data(1)
    assert inputs.shape == (1200, 3, 32, 32)
    for label, name in enumerate(used[1]):
        assert torch.equal((inputs[targets == label][:, 0] * 255).round().unique(), torch.tensor([float(name)]))
    held_out = tasks.test_data(1)
    assert held_out[0].shape[0] == 4
    assert set((held_out[0][:, 1, 0, 0] * 255).round().tolist()) == {600 % 256, 601 % 256}


def test_the_two_protocols_of_imagenet(tmp_path):
    write_imagenet(tmp_path / "classes", classes=2)
    assert ContinualImageNet(str(tmp_path / "classes")).epochs_per_task == 20
    assert ContinualImageNet(str(tmp_path / "classes"), protocol="dohare").epochs_per_task == 250


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"protocol": "mine"}, "protocol='mine'"),
        ({"num_tasks": 21}, "more than 100 classes"),
        ({"batch_size": 0}, "batch"),
    ],
)
def test_bad_settings_are_refused(settings, part):
    with pytest.raises(ValueError, match=part):
        IncrementalCIFAR100("nowhere", **settings)


def test_imagenet_refuses_other_settings_and_files(tmp_path):
    with pytest.raises(ValueError, match="protocol='mine'"):
        ContinualImageNet("nowhere", protocol="mine")
    write_imagenet(tmp_path / "small", classes=2, images=600)
    with pytest.raises(ValueError, match="more than 600"):
        ContinualImageNet(str(tmp_path / "small")).task_data(0)
