"""What would be released: wheel and sdist are whole, their pages are well formed, and the wheel's commands run."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build", reason="needs the extra dev")
pytest.importorskip("twine", reason="needs the extra dev")

ROOT = Path(__file__).parents[1]
# What people need from the sdist beside the package: to test it, cite it, and find help.
SOURCE_FILES = {
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "SECURITY.md"),
    *("SUPPORT.md", "pyproject.toml", "docs/index.md", "tests/smoke.py", "examples/fit.yaml"),
}


def python(*arguments: str, cwd: Path = ROOT, path: Path | None = None, timeout: int = 300) -> str:
    environment = os.environ | ({} if path is None else {"PYTHONPATH": str(path)})
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel built from it."""
    directory = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--no-isolation", "--outdir", str(directory), str(ROOT))
    return directory


def only(directory: Path, pattern: str) -> Path:
    (found,) = directory.glob(pattern)
    return found


def test_pages_are_well_formed(dist: Path) -> None:
    python("-m", "twine", "check", "--strict", *map(str, dist.iterdir()))


def test_wheel_has_the_package_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(only(dist, "*.whl")) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = ROOT / "lightning_plasticity"
    files = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file()}
    assert inside == {name for name in files if "__pycache__" not in name}
    assert any(name.endswith(".js") for name in inside)


def test_sdist_has_what_its_tests_need(dist: Path) -> None:
    with tarfile.open(only(dist, "*.tar.gz")) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert inside >= SOURCE_FILES


def test_commands_of_the_wheel_run(dist: Path, tmp_path: Path) -> None:
    """Beside the dependencies that are here; `make test-wheel` installs it into an empty environment."""
    target, smoke = tmp_path / "installed", tmp_path / "smoke.py"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(only(dist, "*.whl")))
    smoke.write_text((ROOT / "tests/smoke.py").read_text(encoding="utf-8"), encoding="utf-8")
    where = python("-c", "import lightning_plasticity as found; print(found.__file__)", cwd=tmp_path, path=target)
    assert Path(where.strip()).is_relative_to(target)
    python(str(smoke), cwd=tmp_path, path=target, timeout=900)
