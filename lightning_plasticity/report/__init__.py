"""The HTML report of finished or running runs: one file, read from the records on disk; works offline."""

from lightning_plasticity.report.find import ReportError
from lightning_plasticity.report.write import offer_report, write_report

__all__ = ["ReportError", "offer_report", "write_report"]
