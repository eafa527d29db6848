"""The digits stream: real images, labels that only the seed and the task decide."""

import pytest
import torch
from lightning.pytorch import Trainer
from sklearn.datasets import load_digits as sklearn_digits

from lightning_plasticity.demo.network import Plain
from lightning_plasticity.streams import RandomLabelDigits
from lightning_plasticity.streams.digits import load_digits


def test_images_are_the_digits_standardised_as_one_set():
    inputs = load_digits()
    assert inputs.shape == (1797, 64)
    assert inputs.mean().abs() < 1e-5  # float32 mean of 115,008 values
    assert (inputs.std() - 1).abs() < 1e-5
    raw = torch.tensor(sklearn_digits().images[7]).reshape(64)
    # An affine map of the raw pixels, the same for all of them.
    slope = (inputs[7].max() - inputs[7].min()) / (raw.max() - raw.min())
    assert torch.allclose(inputs[7], (slope * (raw - raw.min())).float() + inputs[7].min(), atol=1e-5)


def test_tasks_depend_on_seed_and_index_only():
    stream, same, other = RandomLabelDigits(seed=1), RandomLabelDigits(seed=1), RandomLabelDigits(seed=2)
    torch.manual_seed(0)
    first = stream.task_data(3)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, same.task_data(3), strict=True))
    assert not torch.equal(first[1], stream.task_data(4)[1])
    assert not torch.equal(first[1], other.task_data(3)[1])


def test_images_are_drawn_without_replacement_and_labels_are_uniform():
    stream = RandomLabelDigits(samples_per_task=1797)
    inputs, labels = stream.task_data(0)
    assert len(inputs.unique(dim=0)) == len(load_digits().unique(dim=0))
    counts = torch.bincount(labels, minlength=10)
    assert counts.sum() == 1797
    # Binomial(1797, 0.1): mean 180, standard deviation 12.7; five of them leave a false alarm of 1e-5.
    assert (counts - 179.7).abs().max() < 5 * 12.7


def test_the_task_follows_the_epoch(tmp_path):
    seen = []

    class Watching(Plain):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                seen.append(sorted(batch[0].sum(1).tolist()))
            return super().training_step(batch, batch_idx)

    stream = RandomLabelDigits(num_tasks=2, epochs_per_task=2, samples_per_task=20, batch_size=20)
    Trainer(
        max_epochs=4,
        reload_dataloaders_every_n_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    ).fit(Watching(), stream)
    expected = [sorted(stream.task_data(task)[0].sum(1).tolist()) for task in (0, 0, 1, 1)]
    assert seen == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tasks": 0}, "num_tasks=0"),
        ({"epochs_per_task": 0}, "epochs_per_task=0"),
        ({"samples_per_task": 1798}, "1 to 1797"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_sizes_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomLabelDigits(**arguments)
