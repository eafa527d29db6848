"""The YAML of the how-to page builds the callbacks that it shows."""

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "yaml.md"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # instantiate_classes has a new name in new versions
def test_the_page_builds_its_callbacks() -> None:
    text = PAGE.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    callbacks = yaml.safe_load(text)["trainer"]["callbacks"]
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    built = parser.instantiate_classes(parser.parse_object({"callbacks": callbacks})).callbacks
    names = [type(callback).__name__ for callback in built]
    assert names == ["TaskTracker", "HessianSpectrumMonitor", "FeatureRankMonitor", "Regularization"]
    assert built[0].schedule.n == 10
    assert [type(regularizer).__name__ for regularizer in built[3].regularizers] == ["EffectiveRank", "L2"]
