"""Changes that make tasks, and the wrappers that apply them: what stays, what differs, what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_plasticity import EveryNEpochs, TaskTracker
from lightning_plasticity.demo.network import Plain
from lightning_plasticity.streams import (
    DatasetStream,
    Drift,
    LabelNoise,
    LoaderStream,
    PermutedDigits,
    PermutedLabelDigits,
    PermuteLabels,
    PermutePixels,
    RandomLabelDigits,
    RandomLabels,
    SplitClasses,
)

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}
DATA = (torch.arange(60.0 * 12).reshape(60, 3, 2, 2), torch.arange(60) % 6)


def stream(change, **options):
    return DatasetStream(DATA, change, **options)


@given(seed=st.integers(0, 10_000), task=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_a_pixel_permutation_is_one_for_all_samples_and_loses_nothing(seed, task):
    inputs, targets = stream(PermutePixels(), seed=seed).task_data(task)
    assert inputs.shape == DATA[0].shape
    assert torch.equal(targets, DATA[1])
    flat, before = inputs.flatten(1), DATA[0].flatten(1)
    assert torch.equal(flat.sort(dim=1).values, before.sort(dim=1).values)
    assert torch.equal(flat - flat[:1], (before - before[:1]))  # rows differ by constants: the same order in each


def test_tasks_differ_and_repeat_exactly():
    for change in (PermutePixels(), RandomLabels(), PermuteLabels(), LabelNoise(0.5), SplitClasses(2)):
        first, again, other = stream(change).task_data(3), stream(change).task_data(3), stream(change).task_data(4)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True)), change


def test_nothing_consumes_the_global_random_state():
    before = torch.random.get_rng_state()
    for change in (PermutePixels(), RandomLabels(), PermuteLabels(), LabelNoise(), SplitClasses(), Drift()):
        stream(change, samples_per_task=10).task_data(1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_first_task_may_stay_as_it_is():
    assert torch.equal(stream(PermutePixels(first_task=False)).task_data(0)[0], DATA[0])
    assert not torch.equal(stream(PermutePixels(first_task=False)).task_data(1)[0], DATA[0])


def test_permuted_labels_rename_classes_one_to_one():
    labels = stream(PermuteLabels()).task_data(2)[1]
    renamed = {int(new) for old in range(6) for new in labels[DATA[1] == old].unique()}
    assert renamed == set(range(6))
    assert all(len(labels[DATA[1] == old].unique()) == 1 for old in range(6))


def test_label_noise_changes_the_share_it_says():
    many = (torch.zeros(20_000, 1), torch.arange(20_000) % 10)
    labels = DatasetStream(many, LabelNoise(0.3)).task_data(0)[1]
    share = (labels != many[1]).double().mean()
    # 0.3 * 9 / 10 = 0.27, binomial deviation 0.0031; six of them.
    assert abs(float(share) - 0.27) < 0.019
    assert torch.equal(DatasetStream(many, LabelNoise(0.0)).task_data(0)[1], many[1])


@pytest.mark.parametrize("relabel", [True, False])
def test_a_split_holds_all_samples_of_its_classes_only(relabel):
    inputs, labels = stream(SplitClasses(2, relabel)).task_data(5)
    assert len(inputs) == 20
    own = torch.cat([DATA[1][(DATA[0] == x).flatten(1).all(1)] for x in inputs])
    assert len(own.unique()) == 2
    assert all(len(labels[own == label].unique()) == 1 for label in own.unique())
    assert set(labels.tolist()) == ({0, 1} if relabel else set(own.tolist()))


def test_drift_moves_all_samples_alike_and_further_with_each_task():
    shifts = [stream(Drift(0.2)).task_data(task)[0] - DATA[0] for task in range(3)]
    assert torch.allclose(shifts[0], torch.zeros(1))
    assert torch.allclose(shifts[1], shifts[1][:1].expand_as(shifts[1]), atol=1e-4)
    assert torch.allclose(shifts[2], 2 * shifts[1], atol=1e-3)
    assert shifts[1][0].square().mean().sqrt() == pytest.approx(0.2 * float(DATA[0].std()), rel=1e-4)


def test_held_out_data_get_the_same_change():
    inputs = torch.randn(8, 5)
    both = DatasetStream((inputs, DATA[1][:8]), PermutePixels(), test_dataset=(inputs, DATA[1][:8]))
    assert torch.equal(both.task_data(4)[0], both.test_data(4)[0])
    assert DatasetStream(DATA).test_data(0) is None
    assert DatasetStream(DATA).test_dataloader() == []


def test_samples_are_drawn_without_replacement():
    inputs = stream(None, samples_per_task=59).task_data(1)[0]
    assert len(inputs.unique(dim=0)) == 59


class Pairs(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return DATA[0][index], int(DATA[1][index])


class Ragged(Pairs):
    def __getitem__(self, index):
        return torch.zeros(index + 1), 0


@pytest.mark.parametrize("dataset", [(DATA[0][:4], DATA[1][:4]), TensorDataset(DATA[0][:4], DATA[1][:4]), Pairs()])
def test_a_dataset_is_read_once_into_tensors(dataset):
    inputs, targets = DatasetStream(dataset).task_data(0)
    assert torch.equal(inputs, DATA[0][:4])
    assert torch.equal(targets, DATA[1][:4])


@pytest.mark.parametrize(
    ("make", "error", "part"),
    [
        (lambda: DatasetStream(3), TypeError, "dataset is a int"),
        (lambda: DatasetStream(Ragged()), TypeError, "could not be read as"),
        (lambda: DatasetStream((DATA[0], DATA[1][:3])), ValueError, "60 inputs and 3 targets"),
        (lambda: DatasetStream(DATA, samples_per_task=61), ValueError, "samples_per_task=61"),
        (lambda: DatasetStream(DATA, change=3), TypeError, "change=3"),
        (lambda: DatasetStream(DATA, num_tasks=0), ValueError, "num_tasks=0"),
        (lambda: stream(SplitClasses(7)).task_data(0), ValueError, "has 6 classes"),
        (lambda: DatasetStream((DATA[0], DATA[0][:, 0]), RandomLabels()).task_data(0), ValueError, "class indices"),
        (lambda: LabelNoise(1.5), ValueError, "probability=1.5"),
        (lambda: LoaderStream([]), ValueError, "loaders is empty"),
        (lambda: LoaderStream([1, 2], test_loaders=[1]), ValueError, "2 loaders but 1"),
    ],
)
def test_what_makes_no_stream_is_refused(make, error, part):
    with pytest.raises(error, match=part):
        make()


def test_digit_streams_hold_the_digits():
    pixels, labels = PermutedDigits(seed=1).task_data(3), PermutedLabelDigits(seed=1).task_data(3)
    assert torch.equal(pixels[0].sort(1).values, labels[0].sort(1).values)
    assert len(torch.unique(pixels[1] * 10 + labels[1])) == 10


def seen_by(datamodule, fits=1, **options):
    """Inputs of every batch, in order."""
    seen = []

    class Watching(Plain):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0].clone())
            return super().training_step(batch, batch_idx)

    for task in range(fits):
        if fits > 1:
            datamodule.task_id = task
        Trainer(**QUIET, **options).fit(Watching(), datamodule)
    return seen


@pytest.mark.filterwarnings("ignore:GPU available")
def test_one_fit_and_a_fit_per_task_serve_the_same_tasks():
    settings = {"num_tasks": 2, "epochs_per_task": 2, "samples_per_task": 30, "batch_size": 16}
    one = seen_by(RandomLabelDigits(**settings), max_epochs=4, reload_dataloaders_every_n_epochs=2)
    many = seen_by(RandomLabelDigits(**settings), fits=2, max_epochs=2)
    assert len(one) == len(many) == 8
    for task in range(2):  # four batches, two epochs of 30 samples: the same samples, in any order
        epochs = [torch.cat(seen[4 * task + start : 4 * task + start + 2]) for seen in (one, many) for start in (0, 2)]
        assert len({tuple(sorted(epoch.sum(1).tolist())) for epoch in epochs}) == 1
    assert all(torch.equal(a, b) for a, b in zip(one[:4], many[:4], strict=True))


def test_loaders_are_served_as_they_are():
    loaders = [DataLoader(TensorDataset(*RandomLabelDigits().task_data(task)), batch_size=400) for task in range(2)]
    starts = []

    class Noting(TaskTracker):
        def on_task_start(self, trainer, pl_module, task):
            starts.append(self.first_batch[0].clone())

    callbacks = [Noting(EveryNEpochs(1))]
    seen = seen_by(LoaderStream(loaders), max_epochs=2, reload_dataloaders_every_n_epochs=1, callbacks=callbacks)
    assert all(torch.equal(x, RandomLabelDigits().task_data(task)[0]) for task, x in enumerate(seen))
    assert all(torch.equal(a, b) for a, b in zip(seen, starts, strict=True))
