"""Ablation studies: the cells of a `dattri_core.Study`, computed with what they share once."""

from dattri_bench.studies.engine import dry_run, run_study
from dattri_bench.studies.results import Results

__all__ = ["Results", "dry_run", "run_study"]
