"""Routes: what each way of test rows to the train rows costs, from the shapes of one row.

Inverses are not applied to find out: a blockwise inverse is taken to turn each block into a basis
of the size of its factors and back, the most that the parts at hand do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import evolve, frozen

from dattri_core.blocks import Block, DenseBlock, OuterBlock, SpanBlock, SumBlock, shape_of
from dattri_core.capabilities import Outlook
from dattri_core.contract import Shape, plan_inner, with_rows
from dattri_core.plans import Route
from dattri_core.protocols import LinearMap
from dattri_core.rows import Rows
from dattri_core.stages import taken

EXPANSION = 4
"""Blocks alive while one is expanded: as kept, formed, what the step holds, the result."""
NOMINAL = 256
"""Rows of each side for which the order of a contraction is judged before a batch is known."""


@frozen(eq=False)
class Stop:
    """A test row after some steps of its side.

    Args:
        row: A row of the shapes that it has there.
        lead: Whether only linear maps lead here.
        blockwise: Whether the step that leads here is.
        work: Multiply-adds of that step.
        making: Bytes beside the row while whole rows take that step.
    """

    row: Rows
    lead: bool = True
    blockwise: bool = True
    work: int = 0
    making: int = 0


def routes_of(
    steps: Sequence[LinearMap | Outlook],
    row: Rows,
    *,
    variants: bool = False,
    measured: bool = False,
) -> tuple[Route, ...]:
    """Return the routes that a chain allows, the plainest first.

    Args:
        steps: In the order in which rows pass them; of an inverse, what is known of it.
        row: One row as the source gives it.
        variants: Whether several dampings share what is kept of a deferred query.
        measured: Whether train rows pass the test side too, for what a scorer needs of them.
    """
    last = steps[-1] if steps else None
    splits = isinstance(last, Outlook) and last.splits and last.blockwise
    return tuple(
        route
        for split in ((False, True) if splits else (False,))
        for route in _routes(steps, row, variants=variants, measured=measured, split=split)
    )


def shared_steps(steps: Sequence[LinearMap | Outlook], *, split: bool) -> int:
    """Return how many steps of the test side are the same at every damping."""
    inverses = (k for k, step in enumerate(steps) if isinstance(step, Outlook) and step.damped)
    first = next(inverses, len(steps))
    if first == len(steps):
        return first
    step = steps[first]
    reduced = isinstance(step, Outlook) and step.reduced is not None
    return first + (1 if reduced or (split and first == len(steps) - 1) else 0)


def gradient_work(row: Rows) -> int:
    """Return the multiply-adds of a forward and a backward pass for one example."""
    shapes = [shape_of(block) for block in row.blocks.values()]
    return 2 * sum((s.positions or 1) * s.outputs * s.inputs for s in shapes if not s.one_hot)


def contractions_of(row: Rows) -> tuple[str, ...]:
    """Return how each block of train and test rows will most likely be contracted."""
    blocks = ((spec, row.blocks[spec.name]) for spec in row.space)
    return tuple(f"inner of {spec.name} {spec.shape}: {_order(block)}" for spec, block in blocks)


def _routes(
    steps: Sequence[LinearMap | Outlook],
    row: Rows,
    *,
    variants: bool,
    measured: bool,
    split: bool,
) -> list[Route]:
    stops = _stops(steps, row, split=split)
    end = len(stops) - 1
    item = max(4, row.dtype.itemsize)
    lead = max(k for k in range(len(stops)) if stops[k].lead)
    largest = EXPANSION * max(spec.size for spec in stops[-1].row.space) * item
    parts = all(stop.blockwise for stop in stops[lead + 1 :])
    kept = _resident_bytes(stops[-1].row)
    if lead == end:  # what is formed only when it is met is there as factors before
        making = max(0, stops[-1].row.nbytes - kept)
    else:
        making = 0 if parts else max(stop.making for stop in stops[lead + 1 :])
    resident = Route(
        deferred=False,
        cut=end,
        train_row=_train_row(steps, stops, largest, measured=measured),
        test_row=row.nbytes,
        kept=kept,
        making=making,
        expanded=largest if parts and lead < end else 0,
        once=sum(stop.work for stop in stops),
        train=stops[-2].work if split else 0,
        split=split,
        pair=stops[-1].row.space.dim,
    )
    swept: list[Route] = []
    mapped = all(isinstance(step, LinearMap) for step in steps[:-1])
    if variants and split and mapped and _spectral(steps[-1]):
        swept.append(
            evolve(
                resident,
                swept=True,
                cut=end - 1,
                kept=_compact_bytes(stops[end - 1].row),
                making=0,
                expanded=0,
                once=sum(stop.work for stop in stops[:end]),
                each=_forming(stops[end - 1].row),
            )
        )
    cut = _cut(stops, shared_steps(steps, split=split) if variants else end)
    if cut is None or stops[cut].row.nbytes >= resident.kept:
        return [*swept, resident]
    deferred = evolve(
        resident,
        deferred=True,
        cut=cut,
        kept=stops[cut].row.nbytes,
        making=0 if stops[cut].lead else making,
        expanded=largest if cut < end else 0,
        once=sum(stop.work for stop in stops[: cut + 1]),
        each=sum(stop.work for stop in stops[cut + 1 :]) + _forming(stops[-1].row),
    )
    return [*swept, resident, deferred]


def streams_through(step: LinearMap | Outlook) -> bool:
    """Return whether train rows pass a step block by block."""
    if isinstance(step, LinearMap) or step.two_sided:
        return step.blockwise
    return step.reduced is None


def _train_row(
    steps: Sequence[LinearMap | Outlook], stops: Sequence[Stop], expanded: int, *, measured: bool
) -> int:
    """Return the bytes of a train row on its way: of its largest block where it streams."""
    row, item = stops[0].row, max(4, stops[0].row.dtype.itemsize)
    inverted = measured and not stops[-1].lead
    if all(map(streams_through, steps)) and (not inverted or all(s.blockwise for s in stops)):
        roots = any(isinstance(step, Outlook) and step.two_sided for step in steps)
        block = max(block.nbytes for block in row.blocks.values())
        return block + (expanded if roots or inverted else 0)
    whole = row.nbytes + 2 * row.space.dim * item
    # As the train side leaves it, and what an inverse of whole rows works with beside it.
    return whole + (4 * max(stop.row.space.dim for stop in stops) * item if inverted else 0)


def _cut(stops: Sequence[Stop], most: int) -> int | None:
    """Return after how many steps a row is smallest, where blocks can pass the rest one by one."""
    names = stops[-1].row.space.names
    allowed = [
        k
        for k in range(most + 1)
        if all(stop.blockwise for stop in stops[k + 1 :]) and stops[k].row.space.names == names
    ]
    return min(allowed, key=lambda k: (stops[k].row.nbytes, -k), default=None)


# --- one row on its way ---------------------------------------------------------------------------
def _stops(steps: Sequence[LinearMap | Outlook], row: Rows, *, split: bool) -> list[Stop]:
    stops = [Stop(row)]
    for step in steps:
        if isinstance(step, LinearMap):
            stops.append(_mapped(stops[-1], step))
            continue
        before = stops[-1].row
        work = _forming(before)
        if split and step is steps[-1]:
            # Turned into the basis of the inverse: factors of the same size.
            stops.append(Stop(before, stops[-1].lead, work=_turning(before)))
        else:
            work += _turning(before) + _turning(_formed(before))
        stops.append(_inverted(stops[-1], step, work))
        if step.reduced is not None:
            stops.append(Stop(stops[-1].row, lead=False, blockwise=True))
    return stops


def _mapped(before: Stop, step: LinearMap) -> Stop:
    row = taken(step, before.row)
    work = 0
    for name, block in row.blocks.items():
        if row is not before.row and name in before.row.blocks:
            of, into = shape_of(before.row.blocks[name]), shape_of(block)
            turn = of.outputs * into.outputs + of.inputs * into.inputs
            work += turn * (into.positions or max(1, of.outputs))
    making = 0 if before.lead else _formed_bytes(before.row, row, count=3)
    return Stop(row, before.lead, step.blockwise, work, making)


def _inverted(before: Stop, step: Outlook, work: int) -> Stop:
    if not step.damped and step.rank is None:
        return Stop(before.row, before.lead, step.blockwise)
    row = before.row
    if not step.forms and step.damped and step.rank is None:
        row, work = _combined(row, step.base)
        making = 3 * 8 * step.base  # of products with the base, in float64
        return Stop(row, lead=False, blockwise=step.blockwise, work=work, making=making)
    if step.reduced is not None:
        zero = torch.zeros((), dtype=row.dtype)
        row = Rows.from_flat(step.reduced, zero.expand(1, step.reduced.dim), row.index)
    elif step.forms:
        row = _formed(row)
    if step.rank is not None:
        row = _of_rank(row, step.rank)
    making = _formed_bytes(before.row, row, count=step.beside)
    return Stop(row, lead=False, blockwise=step.blockwise, work=work, making=making)


def _formed_bytes(*rows: Rows, count: int) -> int:
    """Return the bytes of so many formed rows of the larger space."""
    return count * max(row.space.dim for row in rows) * max(4, rows[0].dtype.itemsize)


def _combined(row: Rows, count: int) -> tuple[Rows, int]:
    """Return a row plus a combination of others like it, and the work of meeting those."""
    blocks: dict[str, Block] = {}
    work = 0
    zero = torch.zeros((), dtype=row.dtype)  # expanded: of their shapes, without their memory
    for name, block in row.blocks.items():
        base: Block = DenseBlock(zero.expand(count, *block.shape))
        if block.positions is not None:
            outputs, inputs = (zero.expand(count, block.positions, n) for n in block.shape)
            base = OuterBlock(outputs, inputs)
        blocks[name] = SumBlock((block, SpanBlock(zero.expand(1, count), base)))
        work += plan_inner(shape_of(base), shape_of(block)).multiply_adds
    return Rows(row.space, blocks, row.index), work


def _formed(row: Rows) -> Rows:
    zero = torch.zeros((), dtype=row.dtype)
    return row.map_blocks(lambda _, block: DenseBlock(zero.expand(1, *block.shape)))


def _of_rank(row: Rows, rank: int) -> Rows:
    zero = torch.zeros((), dtype=row.dtype)

    def cut(name: str, block: Block) -> Block:
        if row.space[name].kind != "outer":
            return block
        outputs, inputs = block.shape
        factors = OuterBlock(zero.expand(1, rank, outputs), zero.expand(1, rank, inputs))
        return factors if factors.nbytes < block.nbytes else block

    return row.map_blocks(cut)


# --- multiply-adds and bytes ----------------------------------------------------------------------
def _turning(row: Rows) -> int:
    """Return the multiply-adds of one linear map on the inputs and one on the outputs."""
    total = 0
    for s in (shape_of(block) for block in row.blocks.values()):
        formed = s.outputs * s.inputs * (s.outputs + s.inputs)
        if s.positions is not None:  # as factors, or formed before where that is less
            formed = min(s.positions * (s.outputs**2 + s.inputs**2), formed + _forming_of(s))
        total += formed
    return total


def _forming(row: Rows) -> int:
    return sum(map(_forming_of, map(shape_of, row.blocks.values())))


def _forming_of(shape: Shape) -> int:
    each = shape.outputs * (1 if shape.one_hot else shape.inputs)
    return each * shape.positions if shape.positions is not None else 0


def _order(block: Block) -> str:
    shape = with_rows(shape_of(block), NOMINAL)
    return plan_inner(shape, shape).order


def _spectral(step: LinearMap | Outlook) -> bool:
    return isinstance(step, Outlook) and step.spectral


def _compact_bytes(row: Rows) -> int:
    """Return the bytes of a query as factors or formed, whichever is less, block by block."""
    item = max(4, row.dtype.itemsize)
    return sum(min(row.blocks[spec.name].nbytes, spec.size * item) for spec in row.space)


def _resident_bytes(row: Rows) -> int:
    """Return the bytes of a query that is formed once, where its contraction forms it."""
    item = max(4, row.dtype.itemsize)
    total = 0
    for spec in row.space:
        block = row.blocks[spec.name]
        total += spec.size * item if _order(block) == "form" else block.nbytes
    return total
