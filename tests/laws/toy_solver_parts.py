"""Toy solvers and their inverses: right without a fault, broken with one."""

from __future__ import annotations

import torch
from attrs import evolve, field, frozen
from toy_loose import emptied

from dattri_core import (
    BlockSpec,
    Damping,
    DenseBlock,
    NumericsError,
    Rows,
    Space,
    kept,
)
from dattri_core.testing import ToyOperator


def noise():
    """Return a factor that differs from 1 in the last digits, from the global random state."""
    return 1 + 1e-12 * torch.rand((), dtype=torch.float64)


# --- sources --------------------------------------------------------------------------------


@frozen
class ToySolver:
    """The damped inverse by eigenvalues; with ``exact`` false it declares that it approximates."""

    damping: Damping = field(
        default=Damping(1e-3), converter=lambda d: d if isinstance(d, Damping) else Damping(d)
    )
    fault: str = ""
    exact: bool = True
    reduced: bool = False
    blockwise: bool = False
    needs = frozenset({"dense"})

    def check(self, space):
        pass

    def out_space(self, space):
        return _coordinates(space) if self.reduced else space

    def solve_for(self, operator, device):
        matrix = operator.dense()
        if self.blockwise:
            matrix = block_diagonal(operator.space, matrix)
        if self.fault == "mean":
            matrix = matrix.diagonal().mean() * torch.eye(len(matrix)).to(matrix)
        values, vectors = torch.linalg.eigh(matrix)
        if self.fault == "kept":  # with the damping, under a name that leaves it out
            shift = self.damping.absolute(float(values.mean()))
            own = {"values": values + shift}
            values = kept(operator, "values", {}, lambda: own)["values"] - shift
        if self.fault == "shift" and values[0] < -1e-9:
            raise NumericsError("indefinite")
        made = ToyInverse(self.fault, operator.space, values, vectors, self.damping, self.blockwise)
        return ToyReduced(made) if self.reduced else made


@frozen
class ToyRootSolver(ToySolver):
    """A solver that knows the root of its inverse too."""

    def root_for(self, operator, device):
        values, vectors = torch.linalg.eigh(operator.dense())
        if self.fault == "hide":
            values = values.clamp_min(0)
        return ToyRoot(self.fault, operator.space, values, vectors, self.damping)


@frozen(eq=False)
class ToyRoot:
    fault: str
    space: Space
    values: torch.Tensor
    vectors: torch.Tensor
    damping: Damping
    blockwise = False
    stats = {}

    def with_damping(self, damping):
        return evolve(self, damping=damping)

    def apply(self, rows):
        shifted = self.values + self.damping.absolute(float(self.values.mean()))
        if float(shifted.min()) <= 0:
            raise NumericsError("no real root")
        power = -0.6 if self.fault == "power" else -0.5
        flat = rows.flat()
        turned = flat.double() @ self.vectors * shifted**power
        if self.fault != "turned":
            turned = turned @ self.vectors.T
        return Rows.from_flat(self.space, turned.to(flat.dtype), rows.index, rows.aux)


def block_diagonal(space, matrix):
    """Return a matrix without the entries between two blocks of a space."""
    sizes = torch.tensor([spec.size for spec in space])
    of = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    return matrix * (of[:, None] == of[None]).to(matrix.device)


def _coordinates(space):
    return Space((BlockSpec("eigenvectors", "dense", (space.dim,)),))


@frozen(eq=False)
class ToyReduced:
    """The inverse in coordinates: Q^T g on the train side, Q^T A h on the test side."""

    inner: object
    blockwise = False

    @property
    def stats(self):
        return self.inner.stats

    @property
    def train_map(self):
        return ToyCoordinates(self.inner.space, self.inner.vectors, self.inner.fault)

    def with_damping(self, damping):
        return ToyReduced(self.inner.with_damping(damping))

    def apply(self, rows):
        sides = ToyCoordinates(self.inner.space, self.inner.vectors)
        return sides.map(self.inner.apply(rows))

    def in_basis(self, rows):
        sides = ToyCoordinates(self.inner.space, self.inner.vectors)
        found = self.apply(sides.adjoint(rows))
        return found if self.inner.fault != "halves" else sides.map(sides.adjoint(rows))


@frozen(eq=False)
class ToyCoordinates:
    space: Space
    vectors: torch.Tensor
    fault: str = ""
    blockwise = False

    @property
    def out_space(self):
        return _coordinates(self.space)

    def map(self, rows):
        flat = rows.flat() @ self.vectors.to(rows.dtype)
        index = torch.arange(len(rows)) if self.fault == "sides" else rows.index
        return Rows.from_flat(self.out_space, flat, index, rows.aux)

    def adjoint(self, rows):
        flat = rows.flat() @ self.vectors.to(rows.dtype).T
        return Rows.from_flat(self.space, flat, rows.index, rows.aux)


@frozen(eq=False)
class ToyInverse:
    fault: str
    space: Space
    values: torch.Tensor
    vectors: torch.Tensor
    damping: Damping
    blockwise: bool = False

    @property
    def stats(self):
        if self.fault == "stats":
            return {"residual": float("nan")}
        told = self.fault in ("", "early") and not self.blockwise
        return {"residual": 1e-13} if told else {}

    def with_damping(self, damping):
        return self if self.fault == "keep" else evolve(self, damping=damping)

    def _apply(self, flat):
        mean = float(self.values.max() if self.fault == "relative" else self.values.mean())
        damping = self.damping.absolute(mean)
        if self.fault == "floor":
            damping = min(damping, 1e3)
        values = self.values.clamp_min(0) if self.fault == "clip" else self.values
        live = values.abs() > 1e-12 * values.abs().max()
        definite = bool(values[0] > 1e-9)
        values = values + damping + (0.01 if self.fault == "shift" and definite else 0)
        inverse = live / values if self.fault == "range" else 1 / values
        return ((flat @ self.vectors) * inverse) @ self.vectors.T

    def apply(self, rows):
        if self.blockwise and len(rows.space) < len(self.space):
            blocks = {
                spec.name: rows.blocks.get(spec.name)
                or DenseBlock(
                    torch.zeros(len(rows), *spec.shape, dtype=rows.dtype, device=rows.device)
                )
                for spec in self.space
            }
            whole = self.apply(Rows(self.space, blocks, rows.index, rows.aux))
            part = whole.select(rows.space.names)
            leak = 1.001 if self.fault == "leak" else 1.0
            return part.scale(torch.full((len(rows),), leak, device=rows.device))
        given = rows.flat()
        flat = given.double()
        if self.fault == "in place":
            emptied(rows)
        if self.fault == "zero":
            size = flat.norm(dim=1, keepdim=True)
            found = self._apply(flat / size) * size
        else:
            found = self._apply(flat)
        if self.fault == "bend":
            found = found + 1e-3 * self._apply(found * found.abs())
        if self.fault in ("skew", "turn"):
            turn = torch.ones_like(self.vectors)
            found = found + 1e-3 * self._apply(found @ (turn.triu() - turn.tril()))
        if self.fault == "device" and found.device.type != "cpu":
            found = 1.001 * found
        if self.fault == "alone" and len(rows) == 1:
            found = 1.001 * found
        if self.fault == "formed" and all(b.positions is None for b in rows.blocks.values()):
            found = 2 * found
        if self.fault == "noise":
            found = found * noise()
        if self.fault == "early":
            found = found * (1 + 1e-7)
        if self.fault == "coarse" and given.dtype == torch.float32:
            found = 1.01 * found
        if self.fault == "negative":
            found = -found
        if self.fault != "wide":
            found = found.to(given.dtype)
        return Rows.from_flat(self.space, found, rows.index, rows.aux)


@frozen
class ToySpectralSolver:
    """The damped inverse from the spectrum of an operator, block by block where it has blocks."""

    damping: Damping = field(
        default=Damping(1e-3), converter=lambda d: d if isinstance(d, Damping) else Damping(d)
    )
    fault: str = ""
    exact: bool = True
    needs = frozenset({"spectral"})

    def check(self, space):
        pass

    def solve_for(self, operator, device):
        return ToySpectralInverse(self.fault, operator, self.damping)


@frozen(eq=False)
class ToySpectralInverse:
    fault: str
    operator: ToyOperator
    damping: Damping
    stats = {}

    @property
    def blockwise(self):
        return self.operator.basis.blockwise

    def with_damping(self, damping):
        return evolve(self, damping=damping)

    @property
    def basis(self):
        return self.operator.basis if self.blockwise and self.operator.complete else None

    def in_basis(self, rows):
        blocks = {}
        for name, block in rows.blocks.items():
            weight = 1 / (self.operator.eigenvalues[name] + self._damping(name))
            if self.fault == "unsplit":
                weight = 1.001 * weight
            blocks[name] = DenseBlock(block.flat() * weight.to(block.dtype))
        return Rows(rows.space, blocks, rows.index, rows.aux)

    def _damping(self, name):
        values, space = self.operator.eigenvalues, self.operator.space
        if self.blockwise and self.fault != "whole":
            return self.damping.absolute(float(values[name].sum()) / space[name].size)
        return self.damping.absolute(sum(float(v.sum()) for v in values.values()) / space.dim)

    def apply(self, rows):
        basis, found = self.operator.basis, {}
        wide = rows.to(dtype=torch.float64)
        turned = basis.map(wide)
        for name, block in turned.blocks.items():
            damping = self._damping(name)
            weight = 1 / (self.operator.eigenvalues[name] + damping) - 1 / damping
            found[name] = DenseBlock(block.flat() * weight)
        answer = basis.adjoint(Rows(turned.space, found, rows.index))
        parts = []
        for name in rows.space.names:
            damping = self._damping(name if self.blockwise else "all")
            parts.append(answer.blocks[name].flat() + wide.blocks[name].flat() / damping)
        return Rows.from_flat(rows.space, torch.cat(parts, 1).to(rows.dtype), rows.index, rows.aux)
