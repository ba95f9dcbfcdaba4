"""Dense float64 oracles: operators that are matrices, and Hessians by torch.autograd.functional."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from attrs import define
from torch import Tensor, nn
from torch.func import functional_call

from dattri_core import BlockSpec, OuterBlock, Rows, Space


@define(eq=False)
class MatrixOperator:
    """A symmetric matrix as an operator; counts the products that are asked of it."""

    matrix: Tensor  # [d, d]
    dtype: torch.dtype = torch.float64
    memory: int = 2**30
    products: int = 0
    vectors: int = 0
    dense_calls: int = 0

    @property
    def space(self) -> Space:
        return matrix_space(len(self.matrix))

    def apply(self, rows: Rows) -> Rows:
        self.products += 1
        self.vectors += len(rows)
        flat = rows.flat().double() @ self.matrix.double()
        return Rows.from_flat(self.space, flat.to(self.dtype), rows.index)

    def dense(self) -> Tensor:
        self.dense_calls += 1
        return self.matrix.double().clone()


def matrix_space(size: int) -> Space:
    """Return a space of ``size`` entries in a matrix block and a vector block where it can."""
    if size < 3:
        return Space((BlockSpec("v", "dense", (size,)),))
    head = 2 * ((size - 1) // 2)
    return Space((BlockSpec("m", "outer", (2, head // 2)), BlockSpec("v", "dense", (size - head,))))


def rows_of(flat: Tensor) -> Rows:
    """Return flat rows ``[C, d]`` in `matrix_space`, positions counted from 10."""
    space = matrix_space(flat.shape[1])
    return Rows.from_flat(space, flat, torch.arange(10, 10 + len(flat)), {"a": flat[:, 0]})


def factored(rows: Rows) -> Rows:
    """Return equal rows whose matrix block is kept as two factors."""
    values = rows.blocks["m"].dense().values  # [C, 2, I]
    eye = torch.eye(2, dtype=values.dtype).expand(len(rows), 2, 2)
    blocks = {**rows.blocks, "m": OuterBlock(eye, values)}
    return Rows(rows.space, blocks, rows.index, rows.aux)


def symmetric(values: Tensor, seed: int) -> Tensor:
    """Return a symmetric matrix with the given eigenvalues ``[d]`` and a random basis."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(noise).Q
    matrix = basis * values.double() @ basis.mT
    return (matrix + matrix.mT) / 2


def flatten(values: Mapping[str, Tensor], axes: int = 0) -> Tensor:
    """Return parameters joined into flat vectors, in order; the first ``axes`` stay."""
    return torch.cat([value.flatten(axes) for value in values.values()], dim=axes)


def unflatten(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a flat vector cut into parameters."""
    parts = flat.split([value.numel() for value in like.values()])
    return {name: part.reshape(like[name].shape) for name, part in zip(like, parts, strict=True)}


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the detached parameters by name."""
    return {name: value.detach() for name, value in model.named_parameters()}


def hessian_of(total: Callable[[dict[str, Tensor]], Tensor], at: Mapping[str, Tensor]) -> Tensor:
    """Return the Hessian ``[d, d]`` of a scalar function of parameters."""
    return torch.autograd.functional.hessian(lambda flat: total(unflatten(flat, at)), flatten(at))


def ggn_of(
    outputs: Callable[[dict[str, Tensor]], Tensor],
    criterion: Callable[[Tensor], Tensor],
    at: Mapping[str, Tensor],
) -> Tensor:
    """Return J^T C J ``[d, d]``: J of the outputs, C the Hessian of the summed criterion."""
    jacobian = torch.autograd.functional.jacobian(
        lambda flat: outputs(unflatten(flat, at)).flatten(), flatten(at)
    )
    value = outputs(dict(at))
    curve = torch.autograd.functional.hessian(
        lambda flat: criterion(flat.reshape(value.shape)).sum(), value.flatten()
    )
    return jacobian.mT @ curve @ jacobian


def call(model: nn.Module, parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    """Run a model with other parameters."""
    return functional_call(model, parameters, inputs)
