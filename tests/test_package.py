"""The package from outside: its names, its version, its files, and the walls between its rooms."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
import types
from importlib.resources import files
from pathlib import Path

import pytest
import walls

import lightning_plasticity

ROOT = Path(__file__).parents[1]
PACKAGE_DIR = ROOT / "lightning_plasticity"

# The public API. Adding a name here is a decision, and a line in the changelog.
PUBLIC = {
    "CReLU",
    "ContinualBackprop",
    "EffectiveRank",
    "EveryFit",
    "EveryNEpochs",
    "EveryNSteps",
    "FeatureRankMonitor",
    "HessianSpectrumMonitor",
    "L2",
    "L2ERMixin",
    "L2Init",
    "LayerReset",
    "PlasticityAlert",
    "ReDo",
    "Regularization",
    "RegularizerMixin",
    "ShrinkAndPerturb",
    "SparseTopology",
    "SpectralNorm",
    "Spectrum",
    "TaskAttribute",
    "TaskRecord",
    "TaskSchedule",
    "TaskTracker",
    "TrainabilityProbe",
    "Wasserstein",
    "__version__",
    "curvature",
    "insert_layer_norm",
    "linalg",
    "metrics",
    "read_records",
    "streams",
}


# Names


def test_all_is_the_pinned_list() -> None:
    # ruff (RUF022) keeps the order, so only the members are compared.
    assert len(lightning_plasticity.__all__) == len(PUBLIC)
    assert set(lightning_plasticity.__all__) == PUBLIC


def test_names_are_imported_from_where_type_checkers_see_them() -> None:
    """The root imports on demand; what it imports for type checkers must be the same objects."""
    found = {}
    for imported in walls.imports_of(PACKAGE_DIR / "__init__.py", PACKAGE_DIR):
        if imported.typing_only and imported.top == walls.PACKAGE and imported.name is not None:
            if imported.module == walls.PACKAGE:
                found[imported.name] = importlib.import_module(f"{imported.module}.{imported.name}")
            else:
                found[imported.name] = getattr(importlib.import_module(imported.module), imported.name)
    assert set(found) == PUBLIC - {"__version__"}
    assert all(getattr(lightning_plasticity, name) is value for name, value in found.items())
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lightning_plasticity.nothing  # noqa: B018


def test_all_is_what_is_visible() -> None:
    def is_plumbing(name: str) -> bool:
        value = getattr(lightning_plasticity, name)
        # Importing a submodule makes it an attribute of its package, wanted or not.
        own_submodule = isinstance(value, types.ModuleType) and value.__name__ == f"lightning_plasticity.{name}"
        return name == "annotations" or (own_submodule and name not in PUBLIC)

    visible = {name for name in dir(lightning_plasticity) if not name.startswith("_") and not is_plumbing(name)}
    assert visible == PUBLIC - {"__version__"}


def test_public_names_are_documented() -> None:
    names = sorted(PUBLIC - {"__version__"})
    assert [name for name in names if not (getattr(lightning_plasticity, name).__doc__ or "").strip()] == []


# Version and files


def test_version_is_that_of_the_distribution() -> None:
    assert lightning_plasticity.__version__ == importlib.metadata.version("lightning-plasticity")


def test_version_is_the_same_everywhere() -> None:
    def only(pattern: str, name: str) -> str:
        found = re.findall(pattern, (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert len(found) == 1, f"{name} should match {pattern!r} once, and matches {len(found)} times"
        return str(found[0])

    version = only(r'^version = "([^"]+)"$', "pyproject.toml")
    assert importlib.metadata.version("lightning-plasticity") == version, (
        "reinstall: the installed version is an old one"
    )
    assert only(r"^version: (\S+)$", "CITATION.cff").strip("\"'") == version

    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == "Unreleased", "the changelog begins with what is not yet released"
    assert headings[1] == version, "the changelog's latest release is not the version of pyproject.toml"


def test_types_are_shipped() -> None:
    assert (files("lightning_plasticity") / "py.typed").is_file()


# Walls


def test_rooms_import_only_from_rooms_before_them() -> None:
    assert any(PACKAGE_DIR.rglob("*.py"))
    breaks = walls.wall_breaks(PACKAGE_DIR)
    assert not breaks, "\n" + "\n".join(breaks)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="packages_distributions misses packages without top_level.txt")
def test_imported_packages_are_declared() -> None:
    required = {
        re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()
        for requirement in importlib.metadata.requires("lightning-plasticity") or []
        if "extra ==" not in requirement
    }
    providers = importlib.metadata.packages_distributions()
    for module, rooms in walls.outside_imports(PACKAGE_DIR).items():
        if rooms == ["_optional"]:
            continue
        distributions = {name.lower() for name in providers.get(module, [])}
        assert distributions & required, (
            f"{', '.join(rooms)} imports {module}, of {distributions or 'no installed distribution'}, which "
            "pyproject.toml does not require; add it there, or import it through _optional"
        )


HARMLESS = {
    "__init__.py": "from .callbacks import Monitor\nfrom .linalg.lanczos import lanczos\n",
    "linalg/lanczos.py": "import math\nimport torch\nfrom scipy import linalg\nfrom . import quadrature\n",
    "linalg/quadrature.py": "from lightning_plasticity.linalg import lanczos\n",
    "nn/taps.py": "from lightning.pytorch.utilities import rank_zero_warn\nfrom ..linalg import lanczos\n",
    "regularization/mixin.py": "if TYPE_CHECKING:\n    from lightning.pytorch import Trainer\n",
    "records.py": "from .curvature import Spectrum\n",
    "callbacks/monitor.py": "import lightning\nfrom lightning_plasticity import curvature\nfrom .. import records\n",
    "cli.py": "from . import __version__\nfrom .demo import run\nfrom .callbacks import Monitor\n",
}
# What is added to the harmless tree, and a word of the complaint.
HARMFUL = {
    "upwards": ("linalg/lanczos.py", "from ..curvature import hessian_spectrum", "does not come before"),
    "upwards from the root": ("linalg/lanczos.py", "from .. import curvature", "does not come before"),
    "upwards, absolute": ("nn/taps.py", "import lightning_plasticity.callbacks.monitor", "does not come before"),
    "upwards, two levels": ("nn/deep/er.py", "from ...callbacks.monitor import Monitor", "does not come before"),
    "sideways": ("metrics/rank.py", "from ..regularization import L2", "does not come before"),
    "in a function": ("curvature/ggn.py", "def f():\n    from ..callbacks import Monitor", "does not come before"),
    "in a try": (
        "curvature/ggn.py",
        "try:\n    from .. import metrics\nexcept ImportError:\n    pass",
        "does not come before",
    ),
    "for types": ("curvature/ggn.py", "if TYPE_CHECKING:\n    from ..callbacks import Monitor", "does not come before"),
    "callbacks": ("loggers.py", "from . import callbacks", "does not come before"),
    "streams from callbacks": ("callbacks/monitor.py", "from ..streams import Digits", "does not come before"),
    "the root": ("metrics/rank.py", "from lightning_plasticity import L2", "package root"),
    "the root, whole": ("metrics/rank.py", "import lightning_plasticity", "package root"),
    "records": ("records.py", "from .nn import taps", "plain data"),
    "lightning in curvature": ("curvature/ggn.py", "import lightning.pytorch as pl", "does not know Lightning"),
    "lightning in linalg": (
        "linalg/lanczos.py",
        "from lightning.pytorch.utilities import rank_zero_warn",
        "linalg knows",
    ),
    "torchmetrics in linalg": ("linalg/lanczos.py", "def f():\n    import torchmetrics.functional", "linalg knows"),
    "the other namespace": ("metrics/rank.py", "from pytorch_lightning import Trainer", "does not know Lightning"),
    "a trainer": ("regularization/mixin.py", "from lightning.pytorch import Trainer", "no Trainer"),
    "an unknown room": ("helpers.py", "x = 1", "is not known"),
    "an unknown folder": ("helpers/more.py", "x = 1", "is not known"),
    "from an unknown room": ("callbacks/monitor.py", "from ..helpers import x", "not a known room"),
}


def build(root: Path, extra: tuple[str, str] | None = None) -> Path:
    package = root / "lightning_plasticity"
    for name, text in HARMLESS.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    if extra:
        path = package / extra[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "") + extra[1] + "\n")
    return package


def test_wall_check_lets_the_harmless_through(tmp_path: Path) -> None:
    assert walls.wall_breaks(build(tmp_path)) == []


@pytest.mark.parametrize("case", HARMFUL)
def test_wall_check_finds(case: str, tmp_path: Path) -> None:
    name, line, complaint = HARMFUL[case]
    breaks = walls.wall_breaks(build(tmp_path, (name, line)))
    assert len(breaks) == 1, breaks
    assert breaks[0].startswith(f"lightning_plasticity/{name}")
    assert complaint in breaks[0]
