"""What fits computed, kept in a folder: factors, eigenvectors, Ritz pairs, a file each.

The name of a file holds a hash of all that decides its numbers, so that methods, tasks and
checkpoints share a folder and another question is another file. Every file appears by one rename
and holds the digest of its numbers, which is checked when it is read.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, field, frozen
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dattri_core import assemble, describe
from dattri_core.atomic import atomic_file, discard_leftovers, disk_errors
from dattri_core.batch import digest
from dattri_core.errors import StoreError
from dattri_core.locks import sole_writer
from dattri_core.origins import origins_of
from dattri_core.protocols import RandomStream
from dattri_core.rows import Rows
from dattri_core.tensor_file import tensor_file

FIT = "dattri-fit"
PROBE = "probe"
"""Name of the tensor that tells other code of the model or the loss, beside those of the fit."""
NEAR = 1e-3
"""By how much the sizes of a few rows may differ from what they were, relative to the largest."""

Make = Callable[[], Mapping[str, Tensor]]


@frozen(eq=False)
class KeptFits:
    """Where the fits of a method, of one checkpoint of it or of one stage, are kept.

    Args:
        folder: Made when something is kept.
        facts: What decides the numbers besides the part that computes them, JSON-ready.
        sizes: Of each block of a few rows of the train set, their norms and their lengths along a
            fixed direction, ``[s, 2 blocks]``: facts cover weights, data and method, not the code
            of the model and of the loss, and a loss of the other sign has rows of the same norms.
    """

    folder: Path
    facts: Mapping[str, Any]
    sizes: Tensor = field(factory=lambda: torch.empty(0, 0))

    def of(self, rows: Rows, facts: Mapping[str, Any]) -> KeptFits:
        """Return the same for one checkpoint, known by facts of its own and by a few raw rows."""
        sizes = []
        for block in rows.blocks.values():
            flat = block.dense().values.double().flatten(1)
            direction = torch.arange(flat.shape[1], device=flat.device).double().cos()
            sizes += [flat.norm(dim=1), flat @ (direction / direction.norm())]
        return KeptFits(self.folder, {**self.facts, **facts}, torch.stack(sizes, 1).cpu())

    def before(self, projectors: Sequence[Any], stream: RandomStream) -> KeptFits:
        """Return the same for one stage, known by the projectors before it and its random keys."""
        facts = {
            "projectors": [assemble.describe_part(part) for part in projectors],
            "random": [stream.seed, stream.role, stream.checkpoint],
            "origins": {**self.facts["origins"], **origins_of(projectors)},
        }
        return evolve(self, facts={**self.facts, **facts})

    def get(self, name: str, part: Any, make: Make, device: torch.device) -> Mapping[str, Tensor]:
        """Return what a part computes, from disk where it was computed before.

        Args:
            name: What it is, one word, such as ``"factors"``.
            part: The part that computes it, or a nest of parts and numbers: all that its numbers
                depend on besides the facts.
            make: Computes it.
            device: Where what is read goes.

        Raises:
            StoreError: The file is damaged, or the model's code or the loss's changed.
        """
        described = describe.plain(part, assemble.describe_nested)
        origins = {**self.facts["origins"], **origins_of(part)}
        facts = json.loads(json.dumps({**self.facts, "part": described, "origins": origins}))
        owner = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{name}-{owner[:24]}.safetensors"
        if path.exists():
            return self._read(path, owner, device)
        # Two processes with the same fit take turns: the second finds it there.
        with sole_writer(path, f"what a fit computes, in {str(path)!r}", wait=True):
            if path.exists():
                return self._read(path, owner, device)
            # As it will be read: products with another layout in memory round otherwise.
            made = {n: tensor.detach().contiguous() for n, tensor in make().items()}
            self._write(path, made, {"owner": owner, "facts": facts})
        return made

    def _read(self, path: Path, owner: str, device: torch.device) -> dict[str, Tensor]:
        try:
            with safe_open(str(path), framework="pt") as file:
                said = json.loads((file.metadata() or {}).get(FIT, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise _bad(path, f"cannot be read ({error})") from error
        if said.get("owner") != owner:
            raise _bad(path, "belongs to another fit")
        if said.get("digest") != _digest(tensors) or PROBE not in tensors:
            raise _bad(path, "holds numbers that are not those that were written")
        sizes = tensors.pop(PROBE)
        largest = max(float(sizes.abs().max()), float(self.sizes.abs().max()))
        gap = float((sizes - self.sizes).abs().max())
        if not gap <= NEAR * largest:
            raise _bad(
                path,
                "was computed with other rows: the lengths of a few, computed anew, differ by "
                f"{gap:.2g} (the largest is {largest:.2g}), so the loss, the code of the model or "
                "its settings changed",
            )
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def _write(self, path: Path, made: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
        held = {name: tensor.to("cpu") for name, tensor in made.items()}
        held[PROBE] = self.sizes
        text = json.dumps({**said, "digest": _digest(held)})
        try:
            with disk_errors(f"fits: the file {str(path)!r}"):
                discard_leftovers(path)
                with atomic_file(path) as handle:
                    for piece in tensor_file(held, {FIT: text}):
                        handle.write(piece)
        except StoreError as error:  # the fit itself is there: it is not lost for a full disk
            warnings.warn(f"{error}; the run goes on with what is in memory", stacklevel=2)


def _bad(path: Path, why: str) -> StoreError:
    return StoreError(
        f"fits: the file {str(path)!r} {why}; delete it and run again to fit anew, or give "
        "another fits="
    )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    return hashlib.sha256(f"{names}{digest([tensors[n] for n in names])}".encode()).hexdigest()
