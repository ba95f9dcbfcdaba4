"""Which rows stand for the Fisher matrix, and how curvatures made of rows read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from dattri_core import Block, Problem, RowKind, SpecError

Fisher = Literal["sampled", "empirical", "ggn"]
FISHERS: tuple[Fisher, ...] = ("sampled", "empirical", "ggn")
KINDS: dict[Fisher, RowKind] = {"sampled": "fisher", "empirical": "loss", "ggn": "ggn"}
NEEDS: dict[Fisher, str] = {"sampled": "fisher-rows", "empirical": "rows", "ggn": "ggn-rows"}


def check_draws(fisher: Fisher, draws: int) -> None:
    """Raise `SpecError` for draws of labels where none are drawn."""
    if draws != 1 and fisher != "sampled":
        raise SpecError(
            f"draws: got {draws} with fisher={fisher!r}, which draws no labels; leave draws at 1, "
            "or give fisher='sampled'"
        )


def read_blocks(
    problem: Problem, fisher: Fisher, draws: int, add: Callable[[str, Block], None]
) -> None:
    """Hand over every block of every row whose squares sum to ``draws n_train`` times F."""
    for draw in range(draws):
        problem.stream(lambda name, block, _: add(name, block), kind=KINDS[fisher], draw=draw)
