"""Training models again, from scratch, on train sets that might have been."""

from dattri_parts.training.counterfactuals import (
    leave_groups_out,
    leave_one_out,
    random_subsets,
)
from dattri_parts.training.optimum import Optimum
from dattri_parts.training.recipe import Recipe
from dattri_parts.training.retraining import ModelRetraining
from dattri_parts.training.run import Run

__all__ = [
    "ModelRetraining",
    "Optimum",
    "Recipe",
    "Run",
    "leave_groups_out",
    "leave_one_out",
    "random_subsets",
]
