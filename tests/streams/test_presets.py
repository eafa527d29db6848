"""The field's benchmarks as study files: all can be made, and the scaled ones run on files in the right format."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from stream_files import write_cifar100, write_imagenet, write_mnist

from benchmarks.image_files import main as make_files
from lightning_plasticity.streams import ContinualImageNet
from lightning_plasticity.study import load_study, run_study
from lightning_plasticity.study.build import importable, makers
from lightning_plasticity.study.config import parse_study

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
FILES = sorted(path.stem for path in STUDIES.glob("*.yaml") if "ant" not in path.stem)
pytest.importorskip("torchvision")


@pytest.mark.parametrize("name", FILES)
def test_every_method_of_every_study_can_be_made(name: str) -> None:
    study = load_study(STUDIES / f"{name}.yaml")
    assert f"benchmarks/studies/{name}.yaml" in (STUDIES / f"{name}.yaml").read_text()  # its own command
    for unit in study.units()[: len(study.methods)]:
        with importable(unit.search):
            made = makers(unit.settings, "")
            (module,) = made["module"]
            assert sum(p.numel() for p in module().parameters()) > 1000


@pytest.mark.parametrize(
    ("network", "shape", "classes", "size"),
    [
        ("PermutedMNISTNet", (784,), 10, 784 * 1000 + 2 * 1000 * 1000 + 3 * 1000 + 1000 * 10 + 10),
        ("CIFARNet", (3, 32, 32), 100, None),
        (
            "ImageNetNet",
            (3, 32, 32),
            2,
            (75 * 32 + 32) + (288 * 64 + 64) + (576 * 128 + 128) + 512 * 128 + 128 + 16512 + 258,
        ),
    ],
)
def test_networks_of_the_paper(network: str, shape: tuple[int, ...], classes: int, size: int | None) -> None:
    with importable((str(STUDIES),)):
        import paper_networks

        net = getattr(paper_networks, network)()
    assert net(torch.zeros(2, *shape)).shape == (2, classes)
    count = sum(p.numel() for p in net.parameters())
    if size is None:  # torchvision's ResNet-18 has 11,689,512 with a 7 x 7 stem and one layer of 1000 classes
        size = 11_689_512 - 64 * 3 * (49 - 9) - 513 * 1000 + 2 * 513 * 512 + 513 * 100
    assert count == size


def files_of(name: str, root: Path) -> dict[str, Any]:
    """Small files, and the stream's arguments for them."""
    if name == "cifar100":
        write_cifar100(root, 2, 1)
        return {"root": str(root)}
    if name == "imagenet":
        write_imagenet(root / "classes", 4)
        return {"root": str(root / "classes"), "epochs_per_task": 1, "batch_size": 400}
    write_mnist(root, "MNIST", 64, 16)
    return {"root": str(root), "samples_per_task": 32}


@pytest.mark.parametrize("name", ["cifar100", "imagenet", "mnist60k"])
def test_scaled_studies_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_plasticity.study.run.write_figures", lambda *_: None)
    plain = yaml.safe_load((STUDIES / f"{name}.yaml").read_text())
    plain["stream"]["init_args"] |= {"num_tasks": 1, **files_of(name, tmp_path / "data")}
    for entry in plain["measure"]:
        entry["init_args"]["probe_samples"] = 2
    plain["seeds"] = [0]
    study = parse_study(plain, (str(STUDIES),))
    outcome = run_study(study, tmp_path / "out", console=Console(file=io.StringIO()))
    assert outcome.failures == {}
    assert [(row["method"], row["task"]) for row in outcome.rows] == [(method, 0) for method in ("plain", "l2er")]
    for row in outcome.rows:
        assert 0 <= row["online_accuracy"] <= 1
        assert row["ggn/eps_rank_0.001"] >= 1
        assert row["features/effective_rank"] >= 1


def test_made_image_files_are_read_by_the_real_loaders(tmp_path: Path) -> None:
    images, labels = write_mnist(tmp_path, "MNIST", 6300, 16)
    make_files(["--mnist", str(tmp_path), "--out", str(tmp_path / "made"), "--per-class", "3"])
    pairs = ContinualImageNet(str(tmp_path / "made" / "classes"), num_tasks=2)
    inputs, targets = pairs.task_data(0)
    assert inputs.shape == (1200, 3, 32, 32)
    assert targets.bincount().tolist() == [600, 600]
    with importable((str(STUDIES),)):
        from made_streams import MadeCIFAR100

        cifar = MadeCIFAR100(str(tmp_path / "made"), num_tasks=2)
    assert cifar.task_data(1)[0].shape == (30, 3, 32, 32)
    first = (inputs[targets == 0][:, 0] * 255).round().byte().numpy()
    digit, turned = int(pairs.classes(0)[0]) % 10, int(pairs.classes(0)[0])
    if turned < 10:  # not turned: a digit as it is, with two pixels around it
        known = {image.tobytes() for image in images[labels == digit]}
        assert all(image[2:-2, 2:-2].tobytes() in known for image in first.copy())
