"""A source whose train rows are read from a store, after they were computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import define, frozen
from torch import Tensor
from typing_extensions import Protocol

from dattri_core.blocks.finite import all_finite
from dattri_core.checkpoint import Checkpoint
from dattri_core.errors import NumericsError, StoreError, format_bytes
from dattri_core.evaluate import Evaluator
from dattri_core.halving import halved
from dattri_core.locks import sole_writer
from dattri_core.plans import MAXIMUM_BATCH
from dattri_core.problem import collect
from dattri_core.processes import processes_now
from dattri_core.projected import Projected, weights_of
from dattri_core.protocols import BoundSource, LinearMap, Role, Sink
from dattri_core.rows import Rows
from dattri_core.space import BlockSpec, Space
from dattri_core.store import (
    DTYPES,
    EXAMPLES,
    MANIFEST,
    Layout,
    OpenStore,
    Store,
    StoredCheckpoint,
    plan_layout,
)
from dattri_core.stream import Examples

VALUES = ""
"""Name of the rows themselves beside their auxiliary numbers."""
PROBE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By how much rows may differ from those on disk, relative to the largest number, by dtype."""


@frozen(eq=False)
class Keeping:
    """A store for the rows of a method, and the facts that decide their numbers.

    Args:
        store: Where they are kept.
        checkpoint: Whose rows they are.
        facts: What the rows of every checkpoint have in common, JSON-ready.
        advance: Called with the number of rows that are there.
    """

    store: Store
    checkpoint: Checkpoint
    facts: Mapping[str, Any]
    advance: Callable[[int], None] = lambda count: None

    @property
    def whole(self) -> bool:
        """Return whether the store has all rows of the checkpoint."""
        return not _lacks_rows(self.store.folder, self.checkpoint.position)

    def holds(self, rows: Rows) -> bool:
        """Return whether rows made anew are those on disk, but for rounding; all are there."""
        held = OpenStore.read(self.store.folder).held(self.checkpoint.position)
        return _is_rounding(held, *_gap(held, rows))


@frozen(eq=False)
class Formed:
    """The map to formed rows: what is on disk has no factors, so no later stage is promised any."""

    in_space: Space
    blockwise = True
    is_identity = True

    @property
    def out_space(self) -> Space:
        """Return the same blocks, all of kind dense."""
        return Space(tuple(_dense(spec) for spec in self.in_space))

    def map(self, rows: Rows) -> Rows:
        """Return the rows formed, whole or in parts."""
        space = self.out_space.select(rows.space.names)
        blocks = {spec.name: rows.blocks[spec.name].dense() for spec in space}
        return attrs.evolve(rows, space=space, blocks=blocks)

    def adjoint(self, rows: Rows) -> Rows:
        """Return the rows as they are."""
        return attrs.evolve(rows, space=self.in_space.select(rows.space.names))


def _dense(spec: BlockSpec) -> BlockSpec:
    return attrs.evolve(spec, kind="dense")


class KeptRows(Protocol):
    """Projected train rows that are computed already."""

    def read(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return values ``[B, k]`` and auxiliary numbers, each ``[B]``, of rows at positions."""
        ...


@frozen(eq=False)
class HeldRows:
    """Projected train rows in memory: values ``[n, k]`` and auxiliary numbers, each ``[n]``."""

    values: Tensor
    aux: Mapping[str, Tensor]

    def read(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the rows at positions ``[B]``."""
        index = index.to(self.values.device)
        return self.values[index], {name: numbers[index] for name, numbers in self.aux.items()}


@define(eq=False)
class Stored:
    """A source at one checkpoint whose train examples are positions of rows that are kept.

    Test rows are computed as ever; of train rows none is.

    Args:
        projected: Computes test rows, and train rows to be kept.
        rows: On disk or in memory.
    """

    projected: Projected
    rows: KeptRows

    @property
    def space(self) -> Space:
        """Return the space of the rows, formed."""
        return self.projected.space

    @property
    def evaluator(self) -> Evaluator | None:
        """Return the evaluator of the source, where it has one."""
        return self.projected.evaluator

    @property
    def maps(self) -> tuple[LinearMap, ...]:
        """Return the maps that the rows have passed."""
        return self.projected.maps

    @property
    def dtype(self) -> torch.dtype | None:
        """Return the dtype of the rows before the maps, where it is known."""
        return self.projected.dtype

    def stream(self, batch: Any, role: Role, sink: Sink) -> Mapping[str, Tensor]:
        """Hand over the blocks of test examples, or of the train rows at positions ``[B]``."""
        if role == "test":
            return self.projected.stream(batch, role, sink)
        values, aux = self.rows.read(batch)
        dtype = torch.promote_types(self.dtype or values.dtype, torch.float32)
        values = values.to(device=batch.device, dtype=dtype)
        for name, block in Rows.from_flat(self.space, values, batch).blocks.items():
            sink(name, block)
        return {name: numbers.to(batch.device) for name, numbers in aux.items()}


def keep_rows(
    keeping: Keeping,
    projected: Projected,
    examples: Examples,
    rows: Rows,
    activations: int,
    memory: int,
    before: Callable[[], None],
    plan_only: bool,
) -> tuple[BoundSource, Examples, tuple[str, ...]]:
    """Return a source that reads train rows from the store, and the positions it reads them by.

    A plan computes no rows: where some are missing, it gets the source that would.

    Args:
        keeping: Where.
        projected: Computes the rows, formed.
        examples: The train set.
        rows: Of a few examples, computed anew.
        activations: Bytes that a pass takes for one example.
        memory: Bytes of the fit.
        before: Called before rows are computed.
        plan_only: Whether nothing is to be computed.

    Returns:
        The source, its train examples, and lines for the plan.
    """
    device, dim = rows.device, rows.space.dim
    item = max(4, rows.dtype.itemsize)
    batch = max(1, min(MAXIMUM_BATCH, memory // 8 // (activations + 2 * dim * item)))
    wide = torch.promote_types(rows.dtype, torch.float32)
    dtype = keeping.store.dtype or str(wide).removeprefix("torch.")
    layout = plan_layout(len(examples), dim, batch, dtype)
    folder, checkpoint = keeping.store.folder, keeping.checkpoint
    said = f"store             {format_bytes(layout.nbytes)} a checkpoint"
    if plan_only and not (folder / MANIFEST).exists():
        return projected, examples, (f"{said}, nothing there yet",)
    facts = {**keeping.facts, "space": projected.source.space.fingerprint}
    if not (plan_only or examples.known_whole or keeping.store.check == "sample"):
        facts[EXAMPLES] = examples.content
    # Builders take turns: the next one finds the rows there. Readers of whole rows wait for nobody.
    alone = not plan_only and _lacks_rows(folder, checkpoint.position)
    with sole_writer(folder, f"rows in {str(folder)!r}", wait=True) if alone else nullcontext():
        opened = OpenStore.open(folder, facts, layout)
        if plan_only and checkpoint.position not in opened.checkpoints:
            return projected, examples, (f"{said}, this one not there yet",)
        held = opened.checkpoint(
            checkpoint.position, checkpoint.name, weights_of(projected.source) or ""
        )
        require_same_rows(held, rows)
        count = len(held.layout.starts)
        told = (f"{said}, {count - len(held.missing)} of {count} shards there",)
        if plan_only and held.missing:
            return projected, examples, told
        if held.missing:
            before()
        build(projected, held, examples, device, keeping.advance)
    return Stored(projected, held), examples.positions(), told


def _lacks_rows(folder: Path, position: int) -> bool:
    """Return whether rows of a checkpoint are still to be written."""
    if not (folder / MANIFEST).exists():
        return True
    opened = OpenStore.read(folder)
    return position not in opened.checkpoints or bool(opened.held(position).missing)


def build(
    projected: Projected,
    rows: StoredCheckpoint,
    examples: Examples,
    device: torch.device,
    advance: Callable[[int], None],
) -> None:
    """Compute and write the shards that are missing, each whole and in order.

    Raises:
        NumericsError: A number is not finite in the dtype of the store.
    """
    layout = rows.layout
    missing = rows.missing
    advance(layout.rows - sum(layout.stop(start) - start for start in missing))
    with ThreadPoolExecutor(1) as pool:
        writing: Future[None] | None = None
        for start in missing:  # each is written while the next is computed
            values, aux = compute_shard(projected, layout, start, examples, device, advance)
            if writing is not None:
                writing.result()
            writing = pool.submit(rows.write, start, values, aux)
        if writing is not None:
            writing.result()


def compute_shard(
    projected: Projected,
    layout: Layout,
    start: int,
    examples: Examples,
    device: torch.device,
    advance: Callable[[int], None],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return values ``[m, k]`` and auxiliary numbers, each ``[m]``, of the shard from a row on."""
    dtype = DTYPES[layout.dtype]
    parts: list[Tensor] = []
    aux: dict[str, list[Tensor]] = {}
    for index, batch in examples.batches(layout.batch, start, layout.stop(start)):
        for made in halved(
            lambda i, b: collect(projected, b, i, "train", device), index, batch, "train rows"
        ):
            values = made.flat().to(dtype)
            if not all_finite(values):
                bad = (~torch.isfinite(values).all(1)).nonzero().flatten()[0]
                raise NumericsError(
                    f"store: the row of train example {int(made.index[bad])} is not finite in "
                    f"{layout.dtype}; use dattri.Store(folder, dtype='float32') or 'bfloat16'"
                )
            parts.append(values.to("cpu"))
            for name, numbers in made.aux.items():
                aux.setdefault(name, []).append(numbers.to("cpu"))
            advance(len(made))
    return torch.cat(parts), {name: torch.cat(held) for name, held in aux.items()}


def hold(projected: Projected, examples: Examples, batch: int, device: torch.device) -> HeldRows:
    """Compute all train rows and keep them where they are computed.

    Of several processes each computes its part, and gets those of the others.
    """
    processes, count = processes_now(), len(examples)
    first, last = (0, count) if processes is None else processes.part(count)
    held: dict[str, Tensor] = {}
    for index, part in examples.batches(batch, first, last):
        for rows in halved(
            lambda i, b: collect(projected, b, i, "train", device), index, part, "train rows"
        ):
            place = slice(int(rows.index[0]) - first, int(rows.index[-1]) + 1 - first)
            for name, numbers in {VALUES: rows.flat(), **rows.aux}.items():
                shape = (last - first, *numbers.shape[1:])
                held.setdefault(name, numbers.new_empty(shape))[place] = numbers
    if processes is not None:
        held = processes.joined(held, count, device)
    return HeldRows(held.pop(VALUES), held)


def require_same_rows(rows: StoredCheckpoint, some: Rows) -> None:
    """Compare the rows of a few examples, computed anew, with those of them that are on disk.

    The fingerprints cover weights, data and method, not the code of the model and of the loss.

    Raises:
        StoreError: They differ by more than rounding.
    """
    starts = torch.tensor(rows.layout.starts)
    shards = starts[torch.searchsorted(starts, some.index, right=True) - 1]
    there = [at for at, start in enumerate(shards.tolist()) if start not in rows.missing]
    if not there:
        return
    gap, size = _gap(rows, some.take(torch.tensor(there)))
    if not _is_rounding(rows, gap, size):
        raise StoreError(
            f"store {str(rows.folder)!r}: the rows of a few examples, computed anew, differ "
            f"from those on disk by {gap:.2g} (the largest number is {size:.2g}), so the loss, the "
            "code of the model or its settings changed; give another store=, or delete this one"
        )


def _gap(rows: StoredCheckpoint, some: Rows) -> tuple[float, float]:
    """Return by how much rows differ from those on disk at most, and the largest number."""
    held = rows.read(some.index)[0].double()
    fresh = some.flat().to(device="cpu", dtype=torch.float64)
    size = max(float(fresh.abs().max()), float(held.abs().max()))
    return float((held - fresh).abs().max()), size


def _is_rounding(rows: StoredCheckpoint, gap: float, size: float) -> bool:
    return gap <= PROBE[DTYPES[rows.layout.dtype]] * size
