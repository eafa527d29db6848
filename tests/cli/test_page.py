"""The commands of the page on the command line run, and do what it says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from lightning_plasticity.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "command_line.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(block.replace("\\\n", " "))[1:] for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)]
MEASURING = [words for words in COMMANDS if words[0] == "measure"]


def test_the_page_has_commands() -> None:
    assert len(MEASURING) == 2
    assert {words[0] for words in COMMANDS} == {"measure", "fit", "--print-completion=bash"}


@pytest.mark.parametrize("words", MEASURING, ids=["table", "json"])
def test_measuring(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    shown = capsys.readouterr().out
    if "--json" in words:
        assert json.loads(shown)["num_samples"] == 32
    else:
        assert "hessian of 27710 parameters on 64 samples" in shown
        assert re.search(r"^eps_rank_0.001 .*(exact| to )", shown, re.MULTILINE)
