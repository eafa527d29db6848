"""Studies: methods x seeds x one stream, from one YAML file."""

from lightning_plasticity.study.config import Study, StudyError, load_study
from lightning_plasticity.study.run import Outcome, run_study
from lightning_plasticity.study.table import read_table

__all__ = ["Outcome", "Study", "StudyError", "load_study", "read_table", "run_study"]
