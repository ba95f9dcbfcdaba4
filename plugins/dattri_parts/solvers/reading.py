"""One pass over the rows of a curvature: held, or added up where that takes less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import define, field
from torch import Tensor

from dattri_core import Block, Processes, Rows, RowsOperator, concatenate, format_bytes
from dattri_parts.solvers.dual import Dual
from dattri_parts.solvers.factor import precision_of
from dattri_parts.solvers.forecast import PRIMAL
from dattri_parts.solvers.held import groups_of, kept
from dattri_parts.solvers.primal import Primal
from dattri_parts.solvers.together import joined, own_part


@define(eq=False)
class Reading:
    """Rows so far: held by block, or added up where they are more than numbers in a row."""

    operator: RowsOperator
    device: torch.device
    groups: Mapping[str, tuple[str, ...]]
    count: int = 0
    parts: dict[str, list[Block]] = field(factory=dict)  # by block
    moments: dict[str, Tensor] = field(factory=dict)  # by group
    lacking: str = ""  # why reading stopped

    @staticmethod
    def of(operator: RowsOperator, device: torch.device) -> Reading:
        """Read all rows, or those that fit the memory: then ``lacking`` says what they take."""
        reading = Reading(operator, device, groups_of(operator))
        own, processes = own_part(operator)
        for rows in own.rows():
            reading._add(rows)
            if reading.lacking:
                break
        if processes is not None:
            reading._join(processes)
        return reading

    def _join(self, processes: Processes) -> None:
        """Add what the other processes read, so that each has all, in the order of the train set.

        A group that one process adds up, all do: together they have no fewer rows.
        """
        self.lacking = next(filter(None, processes.gathered(self.lacking)), "")
        if self.lacking:
            return
        self.count = sum(processes.gathered(self.count))
        for group in self.groups:
            if group not in self.moments and self.count >= PRIMAL * self._size(group):
                self._turn(group)
        self.lacking = next(filter(None, processes.gathered(self.lacking)), "")
        if self.lacking:
            return
        self.moments = processes.total(self.moments, self.device)
        for group, names in self.groups.items():
            for name in names if group not in self.moments else ():
                self.parts[name] = joined(processes, self.parts.pop(name, []), self.device)
        self._look_for_room()

    def sides(self) -> dict[str, Dual | Primal]:
        """Return each group on its smaller side."""
        operator, precision = self.operator, precision_of(self.operator)
        found: dict[str, Dual | Primal] = {}
        for group, names in self.groups.items():
            if group in self.moments or not self.count:
                space = operator.space.select(names)
                moment = self.moments.get(group)
                if moment is None:
                    moment = torch.zeros(space.dim, space.dim, dtype=torch.float64)
                found[group] = Primal(space, moment, self.count, precision)
                continue
            blocks = {name: concatenate(self.parts.pop(name)) for name in names}
            found[group] = Dual.of(blocks, self._size(group), operator)
        return found

    def _size(self, group: str) -> int:
        return sum(self.operator.space[name].size for name in self.groups[group])

    def _add(self, rows: Rows) -> None:
        self.count += len(rows)
        small = kept(rows)
        for group, names in self.groups.items():
            if group not in self.moments and self.count >= PRIMAL * self._size(group):
                self._turn(group)
                if self.lacking:
                    return
            if group in self.moments:
                self._accumulate(group, [small.blocks[name] for name in names])
                continue
            for name in names:
                self.parts.setdefault(name, []).append(small.blocks[name])
        self._look_for_room()

    def _turn(self, group: str) -> None:
        """Add up what was held of a group."""
        size = self._size(group)
        self.moments[group] = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        self._look_for_room()
        if self.lacking:
            return
        held = [self.parts.pop(name, []) for name in self.groups[group]]
        for blocks in zip(*held, strict=True):
            self._accumulate(group, blocks)

    def _accumulate(self, group: str, blocks: Sequence[Block]) -> None:
        add_squares(self.moments[group], blocks, self.operator.weight)

    def _look_for_room(self) -> None:
        """Say why reading has to stop, where it has to."""
        matrices = sum(16 * self._size(group) ** 2 for group in self.moments)
        duals = len(self.groups) - len(self.moments)
        factors = 8 * duals * self.count**2
        rows = sum(block.nbytes for parts in self.parts.values() for block in parts)
        if matrices + factors + rows > self.operator.memory:
            self.lacking = (
                f"after {self.count} rows of the curvature, rows take {format_bytes(rows)}, Gram "
                f"matrices of {self.count} x {self.count} {format_bytes(factors)} and second "
                f"moments {format_bytes(matrices)}; {format_bytes(self.operator.memory)} may be "
                "used"
            )


def add_squares(moment: Tensor, blocks: Sequence[Block], weight: float) -> None:
    """Add ``weight sum_i r_i r_i^T`` of some rows, joined over blocks, to ``moment [d, d]``."""
    flat = torch.cat([block.flat().double() for block in blocks], dim=1)
    moment.addmm_(flat.T, flat, alpha=weight)
