"""Eigenvectors of Kronecker factors as tensors by name, as they are kept on disk, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from dattri_parts.curvatures.spectrum import Kronecker

OUTPUTS = "/outputs"
INPUTS = "/inputs"
EIGENVALUES = "/eigenvalues"


def tensors_of(sides: Mapping[str, Kronecker]) -> dict[str, Tensor]:
    """Return the eigenvectors of both sides of every block; unit vectors are left out."""
    found = {}
    for name, each in sides.items():
        if each.outputs is not None:
            found[name + OUTPUTS] = each.outputs
        if each.inputs is not None:
            found[name + INPUTS] = each.inputs
    return found


def sides_of(names: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Kronecker]:
    """Return the sides of some blocks from such tensors."""
    return {
        name: Kronecker(tensors.get(name + OUTPUTS), tensors.get(name + INPUTS)) for name in names
    }


def named_eigenvalues(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return eigenvalues by block under the names that they are kept by."""
    return {name + EIGENVALUES: tensor for name, tensor in values.items()}


def eigenvalues_of(names: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the eigenvalues of some blocks from such tensors, in this order."""
    return {name: tensors[name + EIGENVALUES] for name in names}
