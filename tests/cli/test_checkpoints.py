"""``measure --checkpoint`` and ``--data x.pt``: nothing in a file is called, whichever Lightning loads it."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_plasticity.cli import main
from lightning_plasticity.cli.checkpoints import load_module
from lightning_plasticity.cli.common import UsageError

HERE = __name__
WORDS = ("measure", "--module", "hostile_here.Net", "--data", "lightning_plasticity.streams.RandomLabelDigits",
         "--samples", "8")  # fmt: skip


class Net(L.LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Touch:
    """Loaded without restrictions it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(autouse=True)
def unrestricted_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.load`` that is not told otherwise runs what is in a file: Lightning 2.5.3 asks it to."""
    load = torch.load
    monkeypatch.setattr(
        torch, "load", lambda *given, weights_only=None, **more: load(*given, weights_only=bool(weights_only), **more)
    )
    monkeypatch.setitem(sys.modules, "hostile_here", sys.modules[HERE])


def checkpoint(**more: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "state_dict": Net(5).state_dict(),
        "hyper_parameters": {"width": 5},
        "pytorch-lightning_version": L.__version__,
        **more,
    }


@pytest.mark.parametrize("option", ["--checkpoint", "--data"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_hostile_pickle_does_not_run(
    option: str, legacy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touched, file = tmp_path / "touched", tmp_path / "x.pt"
    torch.save(checkpoint(extra=Touch(touched)), file, _use_new_zipfile_serialization=not legacy)
    assert main([*WORDS, option, str(file)]) == 2
    assert not touched.exists()
    said = capsys.readouterr().err
    assert f"{option} {file}" in said
    assert "expected a" in said
    assert "weights_only" not in said
    assert said.count("\n") == 1
    if not legacy:
        assert "holds Python objects (" in said
        assert "pathlib" in said
    torch.load(file)  # the file is as hostile as it should be
    assert touched.exists()


def test_a_bare_pickle_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    assert main([*WORDS, "--checkpoint", str(tmp_path / "x.ckpt")]) == 2
    assert not (tmp_path / "touched").exists()
    assert "expected a checkpoint of Lightning" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["hyper_parameters", "hparams", "module_arguments"])
def test_no_function_named_in_a_checkpoint_is_called(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(sys.modules[HERE], "evil", lambda *given: called.append(given), raising=False)
    # A Lightning that has no list of functions that it trusts.
    monkeypatch.setattr("lightning.pytorch.core.saving._ALLOWED_INSTANTIATORS", {"hostile_here.evil"}, raising=False)
    torch.save(checkpoint(**{key: {"width": 5, "_instantiator": "hostile_here.evil"}}), tmp_path / "x.ckpt")
    assert main([*WORDS, "--checkpoint", str(tmp_path / "x.ckpt")]) == 2
    assert not called
    assert "'hostile_here.evil', which is not called" in capsys.readouterr().err


def test_a_checkpoint_of_lightning_cli_is_loaded_without_its_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.cli.instantiate_module", None)  # calling it would fail
    noted = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": "os.nothing", "width": 5}
    torch.save(checkpoint(hyper_parameters=noted), tmp_path / "x.ckpt")
    loaded, expected = load_module(Net, {}, tmp_path / "x.ckpt"), checkpoint()["state_dict"]
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    noted["width"] = {"class_path": "os.nothing"}  # type: ignore[assignment]
    torch.save(checkpoint(hyper_parameters=noted), tmp_path / "x.ckpt")
    with pytest.raises(UsageError, match=r"'width' names a class, 'os\.nothing'"):
        load_module(Net, {}, tmp_path / "x.ckpt")
    assert load_module(Net, {"width": 5}, tmp_path / "x.ckpt").hparams["width"] == 5


def test_what_is_no_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.ckpt"
    for written, message in (
        (None, "cannot be read; expected a checkpoint of Lightning"),
        (Net().state_dict(), "has no 'state_dict'; expected a checkpoint of Lightning"),
        (checkpoint(hyper_parameters={"width": 4}), "does not fit Net: Error(s) in loading state_dict"),
        (checkpoint(hyper_parameters=[1]), "has hyperparameters that are a list"),
    ):
        file.write_bytes(b"garbage") if written is None else torch.save(written, file)
        assert main([*WORDS, "--checkpoint", str(file)]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
