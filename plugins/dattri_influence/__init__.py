"""Influence functions: recipes, and functions for developers of methods."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dattri_influence.functions.arnoldi import ihvp_arnoldi as ihvp_arnoldi
    from dattri_influence.functions.arnoldi import ihvp_at_x_arnoldi as ihvp_at_x_arnoldi
    from dattri_influence.functions.cg import ihvp_at_x_cg as ihvp_at_x_cg
    from dattri_influence.functions.cg import ihvp_cg as ihvp_cg
    from dattri_influence.functions.explicit import ihvp_at_x_explicit as ihvp_at_x_explicit
    from dattri_influence.functions.explicit import ihvp_explicit as ihvp_explicit
    from dattri_influence.functions.hvp import hvp as hvp
    from dattri_influence.functions.hvp import hvp_at_x as hvp_at_x
    from dattri_influence.functions.ifvp import ifvp_datainf as ifvp_datainf
    from dattri_influence.functions.ifvp import ifvp_explicit as ifvp_explicit
    from dattri_influence.functions.inverse import InverseProduct as InverseProduct
    from dattri_influence.functions.lissa import ihvp_at_x_lissa as ihvp_at_x_lissa
    from dattri_influence.functions.lissa import ihvp_lissa as ihvp_lissa

_EXPORTS = {
    "InverseProduct": "inverse",
    "hvp": "hvp",
    "hvp_at_x": "hvp",
    "ifvp_datainf": "ifvp",
    "ifvp_explicit": "ifvp",
    "ihvp_arnoldi": "arnoldi",
    "ihvp_at_x_arnoldi": "arnoldi",
    "ihvp_at_x_cg": "cg",
    "ihvp_at_x_explicit": "explicit",
    "ihvp_at_x_lissa": "lissa",
    "ihvp_cg": "cg",
    "ihvp_explicit": "explicit",
    "ihvp_lissa": "lissa",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        module = importlib.import_module(f"dattri_influence.functions.{_EXPORTS[name]}")
        value = getattr(module, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dattri_influence' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
