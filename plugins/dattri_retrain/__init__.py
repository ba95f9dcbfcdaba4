"""Retraining: outcomes of models trained on other train sets, and the attributions from them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dattri_retrain.estimate import Estimate as Estimate
    from dattri_retrain.estimate import Stopping as Stopping
    from dattri_retrain.executors import dask_executor as dask_executor
    from dattri_retrain.executors import joblib_executor as joblib_executor
    from dattri_retrain.executors import submitit_executor as submitit_executor
    from dattri_retrain.linear import LinearFit as LinearFit
    from dattri_retrain.linear import lasso_datamodel as lasso_datamodel
    from dattri_retrain.linear import ridge_datamodel as ridge_datamodel
    from dattri_retrain.out_of_bag import data_oob as data_oob
    from dattri_retrain.permutations import beta_weights as beta_weights
    from dattri_retrain.permutations import semivalue as semivalue
    from dattri_retrain.sample_reuse import banzhaf as banzhaf
    from dattri_retrain.sample_reuse import leave_one_out_values as leave_one_out_values
    from dattri_retrain.settings import SettingRetraining as SettingRetraining
    from dattri_retrain.store import CounterfactualStore as CounterfactualStore

_EXPORTS = {
    "CounterfactualStore": "store",
    "Estimate": "estimate",
    "LinearFit": "linear",
    "SettingRetraining": "settings",
    "Stopping": "estimate",
    "banzhaf": "sample_reuse",
    "beta_weights": "permutations",
    "dask_executor": "executors",
    "data_oob": "out_of_bag",
    "joblib_executor": "executors",
    "lasso_datamodel": "linear",
    "leave_one_out_values": "sample_reuse",
    "ridge_datamodel": "linear",
    "semivalue": "permutations",
    "submitit_executor": "executors",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"dattri_retrain.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dattri_retrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
