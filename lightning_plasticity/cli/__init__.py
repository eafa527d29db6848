"""The command line ``lightning-plasticity``; one file for each command, and nothing heavy imported before it runs."""

from lightning_plasticity.cli.main import main

__all__ = ["main"]
