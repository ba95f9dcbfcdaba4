"""The matrix of a built sketch in float64, from its parts."""

from __future__ import annotations

import torch


def matrix_of(mapped, space=None):
    """Return P ``[K, D]`` of a map: flat, blockwise, Kronecker, chained or of covered blocks."""
    space = mapped.in_space if space is None else space
    kind = type(mapped).__name__
    if kind == "ChainMap":
        product = torch.eye(space.dim, dtype=torch.float64)
        for step in mapped.maps:
            product = matrix_of(step) @ product
        return product
    if kind == "FlatMap":
        return mapped.kernel.matrix(0, space.dim) * mapped.kernel.scale
    parts = {spec.name: _of_block(mapped, spec) for spec in space}
    whole = torch.zeros(mapped.out_space.dim, space.dim, dtype=torch.float64)
    rows, columns = mapped.out_space.offsets, space.offsets
    for name, part in parts.items():
        if name in rows:
            row, column = rows[name], columns[name]
            whole[row : row + len(part), column : column + part.shape[1]] = part
    return whole


def _of_block(mapped, spec):
    kind = type(mapped).__name__
    if kind == "CoveredMap":
        if spec.name not in mapped.covered:
            return torch.eye(spec.size, dtype=torch.float64)
        return _of_block(mapped.inner, spec)
    if kind == "BlockwiseFlatMap":
        kernel = mapped.kernels.get(spec.name)
        if kernel is None:
            return torch.eye(spec.size, dtype=torch.float64)
        return kernel.matrix(0, spec.size) * kernel.scale
    assert kind == "KroneckerMap"
    left, right = (
        _of_side(mapped.sides.get((spec.name, side)), size)
        for side, size in zip(("outputs", "inputs"), spec.matrix_shape, strict=True)
    )
    return torch.kron(left, right)


def _of_side(side, size):
    if side is None:
        return torch.eye(size, dtype=torch.float64)
    if hasattr(side, "matrix"):
        return side.matrix
    chosen, matrix = side.selection, torch.zeros(len(side.selection.index), size).double()
    for row, column in enumerate(chosen.index.tolist()):
        matrix[row, column] = chosen.scale
    return matrix
