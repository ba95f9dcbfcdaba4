"""The memory budget: one number in, batch sizes and query groups out."""

from __future__ import annotations

import os
import re
from math import isfinite
from pathlib import Path

import torch
from attrs import field, frozen

from dattri_core.errors import InputError, MemoryBudgetError, format_bytes

UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    UNITS[f"{_letter}ib"] = 1024**_power
    UNITS[f"{_letter}b"] = 1000**_power
    UNITS[_letter] = 1024**_power

DEFAULT_SHARE = 0.5
MAXIMUM_BATCH = 2048
MINIMUM_BUDGET = 2**20
SCORE_BYTES = 8  # of one number of a tile, at most
PAIR_BYTES = (
    4 * SCORE_BYTES
)  # while rows are paired: a total, a block's part, its slices, the result


def parse_bytes(memory: str | int | float | None, device: torch.device) -> int:
    """Return a budget in bytes: a number, a text such as ``"16GiB"``, or half of what is free.

    Raises:
        InputError: The text is not a number with a unit, or the budget is under 1 MiB.
    """
    if memory is None:
        return int(free_bytes(device) * DEFAULT_SHARE)
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-zA-Z]*)\s*", memory)
        if match is None or match[2].lower() not in UNITS:
            raise InputError(f"memory: {memory!r} is not a number with a unit such as '16GiB'")
        memory = float(match[1]) * UNITS[match[2].lower()]
    elif isinstance(memory, bool) or not isinstance(memory, (int, float)) or not isfinite(memory):
        raise InputError(f"memory: {memory!r} is not a number of bytes; give one, or '16GiB'")
    if memory < MINIMUM_BUDGET:
        raise InputError(
            f"memory: {format_bytes(memory)} is too little to work in; give 1 MiB or more"
        )
    return int(memory)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_meminfo(), _cgroup()]
    return min((limit for limit in limits if limit), default=4 * 2**30)


def _meminfo() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):
        return 0


def _cgroup() -> int:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        return int(limit) - int(used) if limit != "max" else 0
    except (OSError, ValueError):
        return 0


@frozen
class Costs:
    """Bytes per example, as measured on a sample and read off the space.

    Args:
        activations: What a forward and backward pass keeps for one example.
        train_row: One train row as the source gives it, the largest block only.
        query: One test row as it is kept for the pass over the train set.
        query_work: What one test row needs beside that while its inverse is computed.
    """

    activations: int
    train_row: int
    query: int
    query_work: int


@frozen
class Plan:
    """How a run fits its budget: sizes, passes over the data, and the bytes of each part.

    ``str(plan)`` is what ``dry_run=True`` shows.
    """

    budget: int
    train_batch: int
    test_batch: int
    query_group: int
    groups: int
    checkpoints: int
    n_train: int
    n_test: int
    shard: int
    bytes: dict[str, int] = field(factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def train_passes(self) -> int:
        """Return how often gradients of the whole train set are computed to score it."""
        return self.groups * self.checkpoints

    def __str__(self) -> str:
        lines = [
            f"budget            {format_bytes(self.budget)}",
            f"train examples    {self.n_train} in batches of {self.train_batch}",
            f"test examples     {self.n_test} in batches of {self.test_batch}",
            f"query groups      {self.groups} of {self.query_group}",
            f"checkpoints       {self.checkpoints}",
            f"train passes      {self.train_passes} to score",
            *(f"{name:<17} {format_bytes(size)}" for name, size in self.bytes.items()),
            *self.notes,
        ]
        return "\n".join(lines)


def make_plan(
    budget: int,
    costs: Costs,
    *,
    n_train: int,
    n_test: int,
    checkpoints: int,
    result_bytes: int,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Choose batch sizes and query groups: as many queries at once as half of the budget holds.

    Each further group of queries costs another pass over the train set, while larger train batches
    only save overhead; so queries come first.

    Raises:
        MemoryBudgetError: Not even one query and one train example fit; says what would.
    """
    per_train = max(1, costs.activations + costs.train_row)
    per_query = max(1, costs.query + costs.query_work + PAIR_BYTES)
    least = per_train + per_query + result_bytes
    left = budget - result_bytes
    if left < per_train + per_query:
        raise MemoryBudgetError(
            f"memory: the budget of {format_bytes(budget)} does not hold one train example "
            f"({format_bytes(per_train)}), one query ({format_bytes(per_query)}) and the scores "
            f"({format_bytes(result_bytes)}); give at least {format_bytes(least)}, or out= to keep "
            "the scores on disk, or attribute fewer parameters"
        )
    group = max(1, min(n_test, int(min(left * 0.5, left - per_train) // per_query)))
    groups = -(-n_test // group)
    group = -(-n_test // groups)  # even groups
    rest = left - group * per_query
    # Half of the rest: contractions and the allocator need room beside the batch itself.
    train_batch = max(
        1, min(n_train, MAXIMUM_BATCH, int(rest * 0.5 // (per_train + PAIR_BYTES * group)))
    )
    test_batch = max(1, min(group, MAXIMUM_BATCH, int(rest * 0.5 // per_train)))
    shard = max(train_batch, min(n_train, int(0.25 * rest // (SCORE_BYTES * max(1, n_test)))))
    return Plan(
        budget=budget,
        train_batch=train_batch,
        test_batch=test_batch,
        query_group=group,
        groups=groups,
        checkpoints=checkpoints,
        n_train=n_train,
        n_test=n_test,
        shard=shard,
        bytes={
            "queries": group * costs.query,
            "query work": group * costs.query_work,
            "train batch": train_batch * per_train,
            "scores": result_bytes,
        },
        notes=notes,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device or the host ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return not isinstance(error, MemoryBudgetError)
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
