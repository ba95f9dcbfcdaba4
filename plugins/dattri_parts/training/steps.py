"""A training run step by step: the weights before every step, and how it was taken."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import evolve
from torch import Tensor, nn

from dattri_core import (
    AdamRule,
    AdamState,
    Checkpoint,
    Loss,
    MemoryBudgetError,
    TrainingStep,
    format_bytes,
    free_bytes,
    take,
)
from dattri_parts.training.objective import scale_of
from dattri_parts.training.recipe import Recipe
from dattri_parts.training.run import copy_of
from dattri_parts.training.sequential import Build, train_one

SHARE = 2
"""One part in so many of the free memory may hold the weights of all steps."""


def step_by_step(
    build: Build,
    recipe: Recipe,
    loss: Loss,
    data: object,
    index: Tensor,
    seed: int,
    device: torch.device,
    tf32: bool = False,
    whole: int | None = None,
) -> tuple[Checkpoint, ...]:
    """Train as `train_one` does, and return the T + 1 checkpoints of the T steps.

    Each has its learning rate and the `TrainingStep` that was taken from it; the last one is the
    end. The arguments are those of `train_one`.

    Raises:
        MemoryBudgetError: The weights of all steps, and Adam's moments, are more than half of the
            free memory.
        NumericsError: The loss is not finite.
    """
    adam = recipe.optimizer == "adamw"
    count = recipe.epochs * recipe.steps(len(index))
    kept: list[Checkpoint] = []
    at_work: list[torch.optim.Optimizer] = []

    def before(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        chosen: Tensor,
        rate: float,
        epoch: int,
    ) -> None:
        state = {name: tensor.cpu() for name, tensor in copy_of(model).items()}
        if not kept:
            _require_room((count + 1) * (3 if adam else 1), state)
            at_work.append(optimizer)
        step = TrainingStep(
            chosen.cpu(),
            recipe.weight_decay,
            epoch - 1,
            recipe.momentum,
            adam=AdamRule.of(optimizer, optimizer.param_groups[0]) if adam else None,
            clip=recipe.clip,
            scale=scale_of(loss, take(data, chosen)),
        )
        moments = _moments(optimizer, model) if adam and kept else None
        at = len(kept)
        kept.append(
            Checkpoint(f"step {at}", at, count + 1, rate, state, step=step, optimiser=moments)
        )

    run = train_one(
        build, recipe, loss, data, index, seed, (), device, before, tf32=tf32, whole=whole
    )
    end = {name: tensor.cpu() for name, tensor in run.states[-1].items()}
    nothing = TrainingStep(torch.empty(0, dtype=torch.long))
    moments = _moments(at_work[0], run.model) if adam else None
    last = Checkpoint("end", count, count + 1, 0.0, end, step=nothing, optimiser=moments)
    return (*kept, last)


def _moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> AdamState:
    """Return copies of the moments on the CPU."""
    held = AdamState.of(optimizer, model).source
    assert isinstance(held, Mapping)
    return AdamState(
        {
            name: evolve(own, first=own.first.cpu(), second=own.second.cpu())
            for name, own in held.items()
        }
    )


def _require_room(states: int, one: dict[str, Tensor]) -> None:
    needed = states * sum(tensor.numel() * tensor.element_size() for tensor in one.values())
    available = free_bytes(torch.device("cpu")) // SHARE
    if needed > available:
        raise MemoryBudgetError(
            f"steps of a run: the weights and moments of all take {format_bytes(needed)}, "
            f"{format_bytes(available)} may be used; take fewer train examples or larger batches, "
            "or keep them on a disk with dattri_unroll.record"
        )
