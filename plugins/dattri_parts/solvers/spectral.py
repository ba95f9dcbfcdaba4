"""The inverse of a curvature whose eigenvectors are known."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import ClassVar

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from dattri_core import (
    Block,
    Damping,
    DenseBlock,
    Inverse,
    LinearMap,
    NumericsError,
    OuterBlock,
    Rows,
    Space,
    SpectralOperator,
    as_damping,
)
from dattri_parts.curvatures.spectrum import KroneckerSpectrum

ROUNDED = 1e-2
"""Relative rounding up to which 1 / damping - L / (damping (L + damping)) stays positive."""
ROUNDING = 1e4
"""Squared rounding errors of a rotation by a few thousand columns, in units of precision^2."""


@frozen
class Spectral:
    """(H + damping I)^-1 g = Q (L + damping)^-1 Q^T g from the spectrum of H; exact, no iterations.

    Serves curvatures that come with their eigenvectors (``ekfac``, ``kfac``, ``diagonal``). Where H
    is block diagonal its blocks are inverted apart, and another damping costs nothing but one
    division for each entry. A spectrum that is not complete is completed by zeros:
    ``g / damping - Q (L / (damping (L + damping))) Q^T g``.

    Args:
        damping: lambda; a number, absolute, or ``{"relative": x}``: x times the mean eigenvalue of
            each block (of H where it has no blocks). A block without any curvature takes the mean
            over all blocks. The default is that of Grosse et al. 2023 (arXiv 2308.03296).
    """

    damping: Damping = field(
        default=Damping(0.1, relative=True),
        converter=as_damping,
    )
    needs: ClassVar[frozenset[str]] = frozenset({"spectral"})
    exact: ClassVar[bool] = True

    def check(self, space: Space) -> None:
        """Accept any space."""

    def solve_for(self, operator: SpectralOperator, device: torch.device) -> Inverse:
        """Return the inverse.

        Raises:
            NumericsError: H + damping I is singular to the operator's precision.
        """
        return _inverse(operator, self.damping, root=False)

    def root_for(self, operator: SpectralOperator, device: torch.device) -> Inverse:
        """Return the inverse whose ``apply`` is (H + damping I)^-1/2 g.

        Raises:
            NumericsError: H + damping I is singular, or has an eigenvalue below zero.
        """
        return _inverse(operator, self.damping, root=True)


@frozen(eq=False)
class _SpectralInverse:
    """A power of H + damping I: -1, or -1/2 as the root of the inverse.

    Args:
        operator: H.
        root: Whether the power is -1/2.
        outside: The power of damping alone, by block of the spectrum.
        dampings: By block of the spectrum.
        weights: The powers of L + damping, by block of the spectrum and of the shape of one row;
            less those of damping alone where the spectrum is not complete.
        stats: Eigenvalues and dampings.
    """

    operator: SpectralOperator
    root: bool
    outside: Mapping[str, float]
    dampings: Mapping[str, float]
    weights: Mapping[str, Tensor]
    stats: Mapping[str, float]

    @property
    def blockwise(self) -> bool:
        """Return whether H is block diagonal."""
        return self.operator.basis.blockwise

    def apply(self, rows: Rows) -> Rows:
        """Return the power of H + damping I times every row, formed, in the rows' dtype.

        Where H is block diagonal the rows may hold a part of the blocks.
        """
        space = self.operator.space
        if not self.blockwise:
            space.require_same(rows.space, "inverse Hessian")
            return self._apply(rows)
        space.select(rows.space.names).require_same(rows.space, "inverse Hessian")
        blocks = {}
        for name in rows.space.names:  # so that one block's rotation is alive at a time
            blocks[name] = self._apply(rows.select([name])).blocks[name]
        return Rows(rows.space, blocks, rows.index, rows.aux)

    @property
    def held(self) -> int:
        """Return the bytes of eigenvectors, eigenvalues and weights that are kept."""
        kept = [*self.operator.eigenvalues.values(), *self.weights.values()]
        sizes = sum(values.numel() * values.element_size() for values in kept)
        return sizes + int(getattr(self.operator.basis, "nbytes", 0))

    @property
    def basis(self) -> LinearMap | None:
        """Return Q, or None where a part of a row lies outside of its span."""
        basis = self.operator.basis
        whole = self.operator.complete and basis.out_space.dim == self.operator.space.dim
        return basis if whole and self.blockwise else None

    @property
    def spectrum(self) -> Mapping[str, tuple[Tensor, float]] | None:
        """Return L and damping of each block; None of a root, or of a spectrum with holes."""
        if self.root or not self.operator.complete:
            return None
        eigenvalues = self.operator.eigenvalues
        return {name: (eigenvalues[name], damping) for name, damping in self.dampings.items()}

    def in_basis(self, rows: Rows) -> Rows:
        """Return (L + damping)^-1 k for rows k = Q^T g, formed."""
        blocks = {name: self._weighted(name, block) for name, block in rows.blocks.items()}
        return Rows(rows.space, blocks, rows.index, rows.aux)

    def with_damping(self, damping: Damping) -> Inverse:
        """Return the inverse at another damping."""
        return _inverse(self.operator, damping, root=self.root)

    def leading(self, share: float) -> Inverse:
        """Return an inverse near to this one, at a part of its work where H is a Kronecker product.

        Eigenvectors of a side are left out where all eigenvalues are at most ``share`` of the
        damping, as if these were zero: M_this <= M_near <= (1 + share) M_this as quadratic forms.
        An inverse that would lose its sign to rounding stays as it is.
        """
        rounding = torch.finfo(self.operator.dtype).eps * self.stats["condition"]
        if self.root or not isinstance(self.operator, KroneckerSpectrum) or rounding > ROUNDED:
            return self
        operator = self.operator.leading({n: share * value for n, value in self.dampings.items()})
        weights = {
            name: _weights(values.double(), self.dampings[name], root=False, complete=False).to(
                operator.dtype
            )
            for name, values in operator.eigenvalues.items()
        }
        outside = {name: 1 / value for name, value in self.dampings.items()}
        return evolve(self, operator=operator, weights=weights, outside=outside)

    def _apply(self, rows: Rows) -> Rows:
        basis = self.operator.basis
        answer = basis.adjoint(self.in_basis(basis.map(rows)))
        formed = {name: answer.blocks[name].dense().values for name in rows.space.names}
        if not self.operator.complete:
            common = next(iter(self.outside.values()))  # of all, where there are no blocks
            for name, values in formed.items():
                share = self.outside.get(name, common)
                formed[name] = values + share * rows.blocks[name].dense().values.to(values.dtype)
        back = {name: DenseBlock(values.to(rows.dtype)) for name, values in formed.items()}
        return Rows(rows.space, back, rows.index, rows.aux)

    def _weighted(self, name: str, block: Block) -> DenseBlock:
        values = block.dense().values
        weights = self.weights[name].to(values.device, values.dtype)
        # What was formed here is nobody else's: a second copy would cost as much as its numbers.
        return DenseBlock(
            values.mul_(weights) if isinstance(block, OuterBlock) else values * weights
        )


def _inverse(operator: SpectralOperator, damping: Damping, *, root: bool) -> _SpectralInverse:
    eigenvalues = {name: values.double() for name, values in operator.eigenvalues.items()}
    _require_finite(eigenvalues)
    dampings = block_dampings(operator, damping)
    precision = torch.finfo(operator.dtype).eps
    condition = 1.0
    for name, values in eigenvalues.items():
        sizes = (values + dampings[name]).abs().flatten()
        if not operator.complete:
            sizes = torch.cat([sizes, sizes.new_tensor([dampings[name]])])
        if not len(sizes):
            continue
        least, greatest = float(sizes.min()), float(sizes.max())
        _require_regular(name, values, least, greatest, precision, dampings[name])
        condition = max(condition, greatest / least)
    negative = sum(int((values + dampings[name] < 0).sum()) for name, values in eigenvalues.items())
    stats = _stats(operator, eigenvalues, dampings, damping)
    stats |= {"negative_eigenvalues": float(negative), "condition": condition}
    if negative:
        _tell_negative(stats, root=root)
    complete = operator.complete
    weights = {
        name: _weights(values, dampings[name], root=root, complete=complete).to(operator.dtype)
        for name, values in eigenvalues.items()
    }
    power = -0.5 if root else -1.0
    outside = {name: 0.0 if complete else value**power for name, value in dampings.items()}
    return _SpectralInverse(operator, root, outside, dampings, weights, stats)


def _weights(values: Tensor, damping: float, *, root: bool, complete: bool) -> Tensor:
    """Return (L + damping)^p, less damping^p where the rest of the space has that already."""
    shifted = values + damping
    if complete:
        return shifted.rsqrt() if root else 1 / shifted
    if not root:
        return -values / (damping * shifted)
    roots, outside = shifted.sqrt(), float(damping**0.5)
    return -values / (outside * roots * (outside + roots))


def _tell_negative(stats: Mapping[str, float], *, root: bool) -> None:
    """Warn of eigenvalues of H + damping I below zero; raise where a root of them is asked for."""
    found = (
        f"{stats['negative_eigenvalues']:.0f} eigenvalues of the curvature stay negative with "
        f"damping {stats['damping']:.3g} (the smallest is {stats['minimum_eigenvalue']:.3g} before "
        "damping)"
    )
    if root:
        raise NumericsError(
            f"solver 'spectral': (H + damping I)^-1/2 does not exist: {found}; give more damping, "
            "the curvature 'ggn', or form='one-sided'"
        )
    warnings.warn(
        f"solver 'spectral': {found}; the exact inverse is used, which turns these directions "
        "around; give more damping or the curvature 'ggn'",
        RuntimeWarning,
        stacklevel=5,
    )


def block_dampings(operator: SpectralOperator, damping: Damping) -> dict[str, float]:
    """Return lambda in the unit of the curvature for each block of the spectrum.

    Raises:
        NumericsError: It is relative to a mean eigenvalue that is not positive.
    """
    eigenvalues = operator.eigenvalues
    traces = {name: float(values.double().sum()) for name, values in eigenvalues.items()}
    total = sum(traces.values())
    if not damping.relative or not operator.basis.blockwise:
        value = damping.absolute(total / max(1, _size(operator)))
        return dict.fromkeys(eigenvalues, value)
    found = {}
    for name, values in eigenvalues.items():
        if bool((values == 0).all()):
            found[name] = damping.absolute(total / max(1, _size(operator)))
        else:
            found[name] = damping.absolute(traces[name] / operator.space[name].size)
    return found


def _size(operator: SpectralOperator) -> int:
    """Return how many eigenvalues H has, those that an incomplete spectrum leaves out included."""
    return operator.basis.out_space.dim if operator.complete else operator.space.dim


def _stats(
    operator: SpectralOperator,
    eigenvalues: Mapping[str, Tensor],
    dampings: Mapping[str, float],
    damping: Damping,
) -> dict[str, float]:
    everything = [values.flatten() for values in eigenvalues.values() if values.numel()]
    if not operator.complete or not everything:
        everything.append(torch.zeros(1, dtype=torch.float64))
    least = min(float(values.min()) for values in everything)
    greatest = max(float(values.max()) for values in everything)
    stats = {
        "damping": next(iter(dampings.values())),
        "minimum_eigenvalue": least,
        "maximum_eigenvalue": greatest,
    }
    if damping.relative and operator.basis.blockwise:  # one for each block: their mean and range
        sizes = {name: operator.space[name].size for name in dampings}
        used = [name for name in dampings if eigenvalues[name].numel() or not operator.complete]
        weighted = sum(dampings[name] * sizes[name] for name in used)
        stats["damping"] = weighted / max(1, sum(sizes[name] for name in used))
        stats["damping_minimum"] = min((dampings[name] for name in used), default=0.0)
        stats["damping_maximum"] = max((dampings[name] for name in used), default=0.0)
    return stats


def _require_finite(eigenvalues: Mapping[str, Tensor]) -> None:
    bad = [name for name, values in eigenvalues.items() if not torch.isfinite(values).all()]
    if bad:
        raise NumericsError(
            f"solver 'spectral': the eigenvalues of {bad} are not finite; look for a diverged "
            "checkpoint, or for squares that overflow: try model.double()"
        )


def _require_regular(
    name: str, values: Tensor, least: float, greatest: float, precision: float, damping: float
) -> None:
    """Raise when H + damping I is singular to what is known of it.

    Eigenvalues of differences are known to the precision of the largest. Those of a sum of squares
    are squares of numbers that are known to it, so to its square.
    """
    squares = not values.numel() or float(values.min()) >= 0
    known = ROUNDING * precision**2 if squares else precision
    if least > known * greatest:
        return
    raise NumericsError(
        f"solver 'spectral': curvature + damping is singular to working precision in block "
        f"{name!r} (damping {damping:.3g}; the eigenvalues of H + damping I have sizes from "
        f"{least:.3g} to {greatest:.3g}, known to {known:.1g} of the largest); give a damping "
        f"above {known * greatest:.1g}, or model.double() for more precision"
    )
