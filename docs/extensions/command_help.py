"""``.. command-help::``: what ``lightning-plasticity --help`` prints, and the help of each of its commands."""

import argparse
import os
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lightning_plasticity.cli.main import make_parser


class CommandHelp(SphinxDirective):
    """A section for each command."""

    def run(self) -> list[nodes.Node]:
        """Called by Sphinx."""
        os.environ["COLUMNS"] = "90"  # argparse fills the terminal
        parser = make_parser()
        commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        found: list[nodes.Node] = [nodes.literal_block(text=parser.format_help(), language="text")]
        for name, command in commands.choices.items():
            section = nodes.section(ids=[nodes.make_id(name)], names=[name])
            section += nodes.title(text=name)
            section += nodes.literal_block(text=command.format_help(), language="text")
            found.append(section)
        return found


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
