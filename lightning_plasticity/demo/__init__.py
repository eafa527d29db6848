"""The demo: two networks on one stream of random-label digits, a plain one and one with L2-ER."""

from lightning_plasticity.demo.run import run_demo

__all__ = ["run_demo"]
