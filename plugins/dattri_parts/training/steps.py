"""A training run step by step: the weights before every step, and how it was taken."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dattri_core import (
    Checkpoint,
    InputError,
    Loss,
    MemoryBudgetError,
    TrainingStep,
    format_bytes,
    free_bytes,
)
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
) -> tuple[Checkpoint, ...]:
    """Train as `train_one` does, and return the T + 1 checkpoints of the T steps.

    Each has its learning rate and the `TrainingStep` that was taken from it; the last one is the
    end. The arguments are those of `train_one`.

    Raises:
        InputError: The steps are not those of gradient descent: another optimiser, or clipping.
        MemoryBudgetError: The weights of all steps are more than half of the free memory.
        NumericsError: The loss is not finite.
    """
    if recipe.optimizer != "sgd" or recipe.clip is not None:
        clipped = "" if recipe.clip is None else f" with gradients clipped to {recipe.clip}"
        raise InputError(
            f"steps of a run: it was trained by {recipe.optimizer!r}{clipped}, and only steps of "
            "SGD without clipping are linear in the gradients of their batches"
        )
    count = recipe.epochs * recipe.steps(len(index))
    kept: list[Checkpoint] = []

    def before(model: nn.Module, chosen: Tensor, rate: float, epoch: int) -> None:
        state = {name: tensor.cpu() for name, tensor in copy_of(model).items()}
        if not kept:
            _require_room(count + 1, state)
        step = TrainingStep(chosen.cpu(), recipe.weight_decay, epoch - 1, recipe.momentum)
        name = f"step {len(kept)}"
        kept.append(Checkpoint(name, len(kept), count + 1, rate, state, step=step))

    run = train_one(build, recipe, loss, data, index, seed, (), device, before, tf32=tf32)
    end = {name: tensor.cpu() for name, tensor in run.states[-1].items()}
    nothing = TrainingStep(torch.empty(0, dtype=torch.long))
    return (*kept, Checkpoint("end", count, count + 1, 0.0, end, step=nothing))


def _require_room(states: int, one: dict[str, Tensor]) -> None:
    needed = states * sum(tensor.numel() * tensor.element_size() for tensor in one.values())
    available = free_bytes(torch.device("cpu")) // SHARE
    if needed > available:
        raise MemoryBudgetError(
            f"steps of a run: the weights of {states} steps take {format_bytes(needed)}, "
            f"{format_bytes(available)} may be used; take fewer train examples or larger batches, "
            "or keep them on a disk with dattri_unroll.record"
        )
