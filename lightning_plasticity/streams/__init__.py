"""Continual streams as LightningDataModules."""

from lightning_plasticity.streams.digits import RandomLabelDigits

__all__ = ["RandomLabelDigits"]
