"""The contraction planner: in which order to multiply rows, decided from shapes alone.

For rows b of one side, ``G_b = sum_t e_bt x_bt^T`` with T positions, and rows c of the other,
with S,

    <G_b, G_c> = sum_ts (e_bt . e_cs) (x_bt . x_cs)

is reached without forming either matrix ("ghost", T S (O + I) products a pair) or by forming both
("form", O I products a pair). Which is cheaper depends on T, S, O, I and on how many rows meet.
Rows that are combinations of m others ("span"), and sums ("parts"), are reached through those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from attrs import evolve, frozen

from dattri_core.errors import SpecError, format_bytes

Order = Literal["ghost", "form", "gather", "span", "parts", "form-first"]
DEFAULT_LIMIT = 256 * 2**20
"""Bytes that one contraction may use for its intermediates; larger ones run in slices of rows."""
DEVICE_LIMIT = 4 * 2**30
"""The same on an accelerator: it is done with a smaller slice before the next one is begun."""
WARM = 16 * 2**20
"""Bytes of the sides of a product at once: about what a processor's cache keeps."""

_limit: ContextVar[int] = ContextVar("contraction limit", default=DEFAULT_LIMIT)


@contextmanager
def contraction_limit(limit: int) -> Iterator[None]:
    """Let contractions inside the block use ``limit`` bytes where they are not told otherwise."""
    token = _limit.set(limit)
    try:
        yield
    finally:
        _limit.reset(token)


def limit_now() -> int:
    """Return the bytes that a contraction may use here."""
    return _limit.get()


@frozen
class Shape:
    """The shape of one side: rows, positions (None once formed), outputs O, inputs I.

    Args:
        rows: How many.
        positions: Products that a row is the sum of.
        outputs: O.
        inputs: I.
        one_hot: The inputs are indices, as those of an embedding.
        distinct: How many rows of inputs there are, where several rows share theirs.
        base: The rows that these are combinations of.
        parts: What these rows are sums of.
    """

    rows: int
    positions: int | None
    outputs: int
    inputs: int
    one_hot: bool = False
    distinct: int | None = None
    base: Shape | None = None
    parts: tuple[Shape, ...] = ()


def with_rows(shape: Shape, rows: int) -> Shape:
    """Return the shape of another number of rows of the same kind."""
    parts = tuple(with_rows(part, rows) for part in shape.parts)
    distinct = shape.distinct
    if distinct is not None:
        distinct = max(1, distinct * rows // max(1, shape.rows))
    return evolve(shape, rows=rows, parts=parts, distinct=distinct)


@frozen
class Plan:
    """The chosen order, its multiply-adds, and the bytes of its intermediates before slicing."""

    order: Order
    multiply_adds: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.order}: {self.multiply_adds:.2e} multiply-adds, {format_bytes(self.bytes)}"


def plan_inner(left: Shape, right: Shape, *, order: Order | None = None, item: int = 4) -> Plan:
    """Choose the order of the inner products of all rows of ``left`` with all of ``right``.

    Args:
        left: Side whose rows may be sliced (train rows, B of them).
        right: The other side (test rows, C of them).
        order: Force an order instead of the cheapest one.
        item: Bytes of one number.

    Returns:
        The cheapest plan, or the forced one; on equal cost the one with less memory.

    Raises:
        SpecError: The forced order does not exist for these two sides.
    """
    return _choose(_inner_plans(left, right, item), order, f"inner of {left} and {right}")


def plan_pair(
    left: Shape, right: Shape | None = None, *, order: Order | None = None, item: int = 4
) -> Plan:
    """Choose the order of the inner products of each row with the same row of the other side.

    Args:
        left: One side.
        right: The other, with as many rows; default the same shape.
        order: Force an order instead of the cheapest one.
        item: Bytes of one number.
    """
    plans = _pair_plans(left, right or left, item)
    return _choose(plans, order, f"pairwise inner of {left} and {right or left}")


def plan_squares(
    side: Shape,
    *,
    on_inputs: bool = False,
    on_outputs: bool = False,
    order: Order | None = None,
    item: int = 4,
) -> Plan:
    """Choose how to sum the squares of all entries over rows, ``sum_b (R e_bt (Q x_bt)^T)^2``.

    The rows may first be mapped by square matrices R on the outputs, Q on the inputs. ``"ghost"``
    multiplies the T (T + 1) / 2 products of two positions and forms no row; ``"form"`` maps the
    factors and forms the rows; ``"form-first"`` forms the rows and maps them, which is less work
    for many positions of a small layer; ``"gather"`` adds up what an embedding's token is given.

    Args:
        side: The rows.
        on_inputs: Whether the inputs are mapped.
        on_outputs: Whether the outputs are mapped.
        order: Force an order instead of the cheapest one.
        item: Bytes of one number.

    Raises:
        SpecError: The forced order does not exist for these rows.
    """
    size = side.outputs * side.inputs
    formed = side.rows * size
    turning = formed * (side.outputs * on_outputs + side.inputs * on_inputs)
    mapped = on_inputs or on_outputs
    if side.positions is None or side.base is not None or side.parts:
        plans = [Plan("form", _forming(side) + turning + formed, (1 + mapped) * formed * item)]
        return _choose(plans, order, f"squares of {side}")
    each = side.rows * side.positions
    factors = side.outputs * side.outputs * on_outputs + side.inputs * side.inputs * on_inputs
    pairs = side.positions * (side.positions + 1) // 2
    clear = formed if side.one_hot and not on_inputs else 0
    reach = 1 if clear else side.inputs
    plans = [
        Plan(
            "form",
            each * (factors + side.outputs * reach) + clear + 2 * formed,
            (formed + each * (side.outputs + side.inputs)) * item,
        )
    ]
    if side.one_hot and not on_inputs:
        plans.append(
            Plan("gather", each * (factors + 2 * side.outputs), 2 * each * side.outputs * item)
        )
    else:
        width = side.outputs + side.inputs
        plans.append(
            Plan(
                "ghost",
                each * factors + side.rows * pairs * size,
                side.rows * (side.positions + pairs) * width * item,
            )
        )
    if mapped:
        plans.append(Plan("form-first", _forming(side) + turning + 2 * formed, 3 * formed * item))
    return _choose(plans, order, f"squares of {side}")


def _choose(plans: list[Plan], order: Order | None, operation: str) -> Plan:
    if order is None:
        return min(plans, key=lambda plan: (plan.multiply_adds, plan.bytes))
    for plan in plans:
        if plan.order == order:
            return plan
    raise SpecError(
        f"{operation}: order {order!r} does not apply; valid: {[plan.order for plan in plans]}"
    )


def _inner_plans(left: Shape, right: Shape, item: int) -> list[Plan]:
    size = left.outputs * left.inputs
    pairs = left.rows * right.rows
    forming = _forming(left) + _forming(right)
    formed_bytes = sum(s.rows * size * item for s in (left, right) if s.positions is not None)
    plans = [Plan("form", forming + pairs * size, formed_bytes)]
    for side, other in ((left, right), (right, left)):
        if side.parts:
            through = [plan_inner(part, other, item=item) for part in side.parts]
            adds = sum(plan.multiply_adds for plan in through)
            return [*plans, Plan("parts", adds, max(plan.bytes for plan in through))]
    for side, other in ((left, right), (right, left)):
        if side.base is not None:
            met = side.base.rows * other.rows
            inner = plan_inner(side.base, other, item=item)
            adds = inner.multiply_adds + met * side.rows
            return [*plans, Plan("span", adds, inner.bytes + met * item)]
    if left.positions is not None and right.positions is not None:
        places = left.positions * right.positions
        meetings = pairs * places
        reach = 1 if left.one_hot or right.one_hot else left.inputs
        met = (left.distinct or left.rows) * (right.distinct or right.rows) * places
        # The two gram matrices are written, multiplied and summed: about two more operations each.
        adds = meetings * (left.outputs + 2) + met * reach
        plans.append(Plan("ghost", adds, 2 * meetings * item))
    for indexed, formed in ((left, right), (right, left)):
        if indexed.one_hot and indexed.positions is not None and formed.positions is None:
            picks = pairs * indexed.positions * indexed.outputs
            plans.append(Plan("gather", 2 * picks, picks * item))
    return plans


def _forming(side: Shape) -> int:
    """Return the multiply-adds of forming all rows of a side."""
    size = side.rows * side.outputs * side.inputs
    if side.positions is None:
        return 0
    if side.parts:
        return sum(_forming(part) + size for part in side.parts)
    if side.base is not None:
        return combining(side.rows, side.base)
    reach = 1 if side.one_hot else side.inputs
    # A one-hot side still has to clear the whole matrix it scatters into.
    return side.rows * side.positions * side.outputs * reach + (size if side.one_hot else 0)


def combining(rows: int, base: Shape) -> int:
    """Return the multiply-adds of forming ``rows`` combinations of the rows of a base."""
    size = base.outputs * base.inputs
    if base.parts:
        return sum(combining(rows, part) + rows * size for part in base.parts)
    if base.base is not None:
        return rows * base.rows * base.base.rows + combining(rows, base.base)
    if base.positions is None:
        return rows * base.rows * size
    return min(_weighing(rows, base), _forming(base) + rows * base.rows * size)


def forms_to_combine(rows: int, base: Shape) -> bool:
    """Return whether combinations of factored rows are less work where those are formed first."""
    formed = _forming(base) + rows * base.rows * base.outputs * base.inputs
    return formed < _weighing(rows, base)


def _weighing(rows: int, base: Shape) -> int:
    """Return the multiply-adds of combinations of factored rows of which none is formed."""
    assert base.positions is not None
    weighed = rows * base.rows * base.positions * base.outputs
    if base.one_hot:
        return 2 * weighed + rows * base.outputs * base.inputs
    products = rows * (base.distinct or base.rows) * base.positions
    return weighed + products * base.outputs * base.inputs


def _pair_plans(left: Shape, right: Shape, item: int) -> list[Plan]:
    size = left.rows * left.outputs * left.inputs
    plans = [Plan("form", _forming(left) + _forming(right) + size, 2 * size * item)]
    for side, other in ((left, right), (right, left)):
        if side.parts:
            through = [plan_pair(part, other, item=item) for part in side.parts]
            adds = sum(plan.multiply_adds for plan in through)
            return [*plans, Plan("parts", adds, max(plan.bytes for plan in through))]
    for side, other in ((left, right), (right, left)):
        if side.base is not None:
            met = side.base.rows * other.rows
            inner = plan_inner(side.base, other, item=item)
            return [*plans, Plan("span", inner.multiply_adds + met, inner.bytes + met * item)]
    if left.positions is not None and right.positions is not None:
        met = left.rows * left.positions * right.positions
        reach = 1 if left.one_hot or right.one_hot else left.inputs
        plans.append(Plan("ghost", met * (left.outputs + reach + 1), 2 * met * item))
    return plans


def rows_per_slice(plan: Plan, rows: int, limit: int) -> int:
    """Return how many rows to take at once so that intermediates stay under ``limit`` bytes."""
    per_row = max(1, plan.bytes // max(1, rows))
    return max(1, min(rows, limit // per_row))
