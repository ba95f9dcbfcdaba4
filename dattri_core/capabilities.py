"""Protocols of what some parts can do besides: each is found by its methods, never by a class."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from dattri_core.protocols import Damping, Inverse, LinearMap, Problem, Projector, Solver


@runtime_checkable
class DataProjector(Projector, Protocol):
    """A sketch that may have to be fitted on the train set."""

    @property
    def needs(self) -> frozenset[str]:
        """Return what `fit` asks of the `Problem`; empty: `build` makes the map without data."""
        ...

    def fit(self, problem: Problem) -> LinearMap:
        """Return the map for the space of the problem, fitted on the whole train set."""
        ...


@runtime_checkable
class InverseRoot(Inverse, LinearMap, Protocol):
    """A fitted inverse Hessian in two-sided form: R of both sides, R^T R = (H + damping I)^-1.

    `map` is R g, for the rows of both sides like the map of a projector, so that a sketch may
    follow; `apply` is R^T R g, as of any inverse.
    """

    def with_damping(self, damping: Damping) -> InverseRoot:
        """Return the root at another damping."""
        ...


@runtime_checkable
class RootSolver(Solver, Protocol):
    """A solver that knows the symmetric root of its inverse, for the two-sided form."""

    def root_for(self, operator: Any, device: torch.device) -> Inverse:
        """Return an inverse whose `apply` is (H + damping I)^-1/2 g instead.

        Raises:
            NumericsError: H + damping I is not positive definite, so that it has no real root.
        """
        ...
