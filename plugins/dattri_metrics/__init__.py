"""Metrics: how good scores are. Functions of arrays, and registered parts that ask for them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dattri_metrics.bootstrap import Bootstrap as Bootstrap
    from dattri_metrics.classes import class_detection as class_detection
    from dattri_metrics.curves import Curve as Curve
    from dattri_metrics.curves import curve as curve
    from dattri_metrics.datamodels import lds as lds
    from dattri_metrics.flips import brittleness as brittleness
    from dattri_metrics.flips import share_flipped as share_flipped
    from dattri_metrics.flips import smallest_removals as smallest_removals
    from dattri_metrics.leave_one_out import loo_correlation as loo_correlation
    from dattri_metrics.mislabel import auroc as auroc
    from dattri_metrics.mislabel import average_precision as average_precision
    from dattri_metrics.mislabel import inspection_area as inspection_area
    from dattri_metrics.origins import mixed_source_detection as mixed_source_detection
    from dattri_metrics.origins import shortcut_detection as shortcut_detection
    from dattri_metrics.overlap import top_k_overlap as top_k_overlap
    from dattri_metrics.stability import model_randomisation as model_randomisation
    from dattri_metrics.stability import rank_stability as rank_stability

_EXPORTS = {
    "Bootstrap": "bootstrap",
    "Curve": "curves",
    "auroc": "mislabel",
    "average_precision": "mislabel",
    "brittleness": "flips",
    "class_detection": "classes",
    "curve": "curves",
    "inspection_area": "mislabel",
    "lds": "datamodels",
    "loo_correlation": "leave_one_out",
    "mixed_source_detection": "origins",
    "model_randomisation": "stability",
    "rank_stability": "stability",
    "share_flipped": "flips",
    "shortcut_detection": "origins",
    "smallest_removals": "flips",
    "top_k_overlap": "overlap",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        module = importlib.import_module(f"dattri_metrics.{_EXPORTS[name]}")
        value = getattr(module, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dattri_metrics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
