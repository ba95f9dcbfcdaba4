"""Training one model by a recipe: the same numbers every time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dattri_core import InputError, Loss, NumericsError, take
from dattri_parts.training.objective import mean_loss
from dattri_parts.training.orders import orders
from dattri_parts.training.products import rounded_products
from dattri_parts.training.recipe import Recipe
from dattri_parts.training.recorded import Gradients, RecordedGradients
from dattri_parts.training.run import Run, copy_of

Build = Callable[[], nn.Module]
Before = Callable[[nn.Module, torch.optim.Optimizer, Tensor, float, int], None]
"""Called before a step with model, optimiser, positions of the batch, rate and epoch."""
RECORDING = ("cuda",)
"""Devices that can record a step."""
_seeding = threading.RLock()  # torch has one generator for all threads


@contextmanager
def with_threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads, then restore; None leaves them."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw the random numbers of a seed, and leave those of others alone."""
    devices = [device] if device.type == "cuda" else []
    with _seeding, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def built(build: Build, device: torch.device) -> nn.Module:
    """Return a new model on a device; drawn on the CPU, so that it is the same on all of them.

    Raises:
        InputError: It is no module, or has nothing to train.
    """
    model = build()
    if not isinstance(model, nn.Module):
        raise InputError(
            f"retraining: build returned a {type(model).__name__}, expected a torch.nn.Module"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            f"retraining: the {type(model).__name__} that build returned has no parameter with "
            "requires_grad, so there is nothing to train"
        )
    return model.to(device)


def train_one(
    build: Build,
    recipe: Recipe,
    loss: Loss,
    data: Any,
    index: Tensor,
    seed: int,
    keep: tuple[int, ...],
    device: torch.device,
    before: Before | None = None,
    recorded: bool = False,
    tf32: bool = False,
    whole: int | None = None,
) -> Run:
    """Return the run of a new model on the examples ``index [k]`` of the data.

    Args:
        build: Makes the model; called once, under the seed.
        recipe: Of the training.
        loss: What is minimised, its mean.
        data: A nest of tensors on the device, labels last.
        index: Positions of the examples, rising.
        seed: Of initial weights, order of examples and dropout.
        keep: Epochs after which the state is kept, beside the last.
        device: To train on.
        before: Called before every step.
        recorded: Whether a CUDA device records the kernels of a step once and replays them, see
            `RecordedGradients`.
        tf32: Whether a CUDA device may take matrix products in TF32, see `rounded_products`.
        whole: Examples of the train set whose order is drawn; see `orders`.

    Raises:
        NumericsError: The loss is not finite.
    """
    with seeded(seed, device), rounded_products(tf32, device):
        model = built(build, device)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = recipe.optimizer_of(trained)
        model.train()

        def compute(chosen: Tensor) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            value = mean_loss(loss, model, take(data, chosen))
            torch.autograd.backward(value)
            return value.detach()

        gradients: Gradients = compute
        if recorded and device.type in RECORDING:
            gradients = RecordedGradients(compute, trained, min(recipe.batch, len(index)))
        kept, step, per_epoch = [], 0, recipe.steps(len(index))
        drawn = orders(index, seed, whole)
        for epoch, order in zip(range(1, recipe.epochs + 1), drawn, strict=False):
            total = torch.zeros((), device=device)
            # Moved at once: a batch of positions from the host would wait for the step before it.
            for chosen in torch.split(order.to(device), recipe.batch):
                rate = recipe.rate(step, per_epoch)
                if before is not None:
                    before(model, optimizer, chosen, rate, epoch)
                total += gradients(chosen)
                _step(optimizer, rate, recipe.clip)
                step += 1
            require_finite(total, epoch, f"{len(index)} examples, seed {seed}")
            if epoch in keep or epoch == recipe.epochs:
                kept.append((epoch, copy_of(model), rate))
    optimizer.zero_grad(set_to_none=True)  # the memory of a recording is free without them
    model.eval()
    epochs, states, rates = zip(*kept, strict=True)
    return Run(model, epochs, states, rates)


def _step(optimizer: torch.optim.Optimizer, rate: float, clip: float | None) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    if clip is not None:
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
    optimizer.step()


def require_finite(total: Tensor, epoch: int, counterfactual: str) -> None:
    """Refuse a sum of losses that is not finite."""
    if not torch.isfinite(total):
        raise NumericsError(
            f"training: the loss is {total.item()} in epoch {epoch} of the counterfactual of "
            f"{counterfactual}; lower the learning rate, add warmup or clip the gradient"
        )
