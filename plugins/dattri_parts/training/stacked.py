"""Training many small models at once: their weights in one stack, one vmapped step for all.

A step of a small model is too short for its cost in Python, and too short to be shared by cores. So
models are stacked until a step is long, and each core trains stacks of its own. A model of a stack
has its own examples, initial weights and order, and meets no other one in any sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from dattri_core import InputError, Loss, at_every_place, map_tensors, parse_bytes
from dattri_parts.training.objective import mean_loss
from dattri_parts.training.orders import orders
from dattri_parts.training.recipe import Recipe
from dattri_parts.training.run import StateDict, copy_of
from dattri_parts.training.sequential import (
    Build,
    built,
    require_finite,
    seeded,
    with_threads,
)

WORKING_SET = 64 * 2**20
"""Bytes that one core's stack touches in a step: above it, weights come from memory each time."""
COPIES = 6
"""Of the weights: they, their gradient, up to two means of it, and two in passing."""


@frozen(eq=False)
class Member:
    """A model that is to be trained.

    Args:
        index: Positions of its examples, rising, ``[k]``.
        seed: Of initial weights and order of examples.
        recipe: Of the training.
    """

    index: Tensor
    seed: int
    recipe: Recipe


def train_stacked(
    build: Build,
    loss: Loss,
    data: Any,
    members: Sequence[Member],
    device: torch.device,
    whole: int | None = None,
) -> list[StateDict]:
    """Return the state of each member after training: that of `train_one` up to rounding.

    Args:
        build: Makes a model; called once for each member, under its seed.
        loss: What is minimised, its mean.
        data: A nest of tensors on the device, labels last.
        members: What tells the models apart. Those with as many examples and one recipe are
            stacked.
        device: To train on.
        whole: Examples of the train set whose order is drawn; see `orders`.

    Raises:
        InputError: A model draws random numbers in training, keeps statistics of its batches, or
            cannot be vmapped.
        NumericsError: The loss of one is not finite.
    """
    models = []
    for member in members:
        with seeded(member.seed, device):
            models.append(built(build, device).train())
    check_stackable(models[0])
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    most = _stack_size(models[0], loss, data, members[0], workers)
    stacks = list(_stacks(members, most, workers))
    stop = Event()

    def train(positions: list[int]) -> None:
        chosen = [members[k] for k in positions]
        _Stack([models[k] for k in positions], loss, data, chosen, whole).train(stop)

    with with_threads(1 if device.type == "cpu" else None), ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(train, stacks))
        finally:
            stop.set()
    return [copy_of(model) for model in models]


def check_stackable(model: nn.Module) -> None:
    """Refuse a model whose training step is no function of its weights and its batch.

    Raises:
        InputError: It has dropout that is on, or statistics of batches.
    """
    for name, module in model.named_modules():
        draws = getattr(module, "p", 0) if isinstance(module, nn.modules.dropout._DropoutNd) else 0
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            draws = module.dropout
        if draws:
            reason = f"drops a share of {draws}, another one in each step"
        elif isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            reason = "keeps statistics of its batches"
        else:
            continue
        raise InputError(
            f"stacked training: the module {name!r} ({type(module).__name__}) {reason}; train the "
            "models one by one with together=1"
        )


def _stacks(members: Sequence[Member], most: int, workers: int) -> Iterator[list[int]]:
    """Yield positions of members that have as many examples and one recipe, hence steps.

    There are as many stacks for each core: none waits for the last ones of another.
    """
    groups: dict[tuple[int, Recipe], list[int]] = {}
    for k, member in enumerate(members):
        groups.setdefault((len(member.index), member.recipe), []).append(k)
    for group in groups.values():
        rounds = math.ceil(len(group) / (most * workers))
        count = min(rounds * workers, len(group))
        ends = [len(group) * (k + 1) // count for k in range(count)]
        for start, end in zip([0, *ends], ends, strict=False):
            yield group[start:end]


def _stack_size(model: nn.Module, loss: Loss, data: Any, member: Member, workers: int) -> int:
    """Return how many models a core's stack may hold: what one touches, against the memory."""
    batch = map_tensors(lambda t: t[member.index[: member.recipe.batch].to(t.device)], data)
    saved = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    map_tensors(note, batch)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        mean_loss(loss, model, batch)
    weights = sum(tensor.nbytes for tensor in model.parameters())
    device = next(model.parameters()).device
    budget = parse_bytes(None, device) // workers
    if device.type == "cpu":
        budget = min(budget, WORKING_SET)
    return max(1, budget // (COPIES * weights + 2 * saved))


class _Stack:
    """Models with as many examples, on their way through one recipe."""

    def __init__(
        self,
        models: list[nn.Module],
        loss: Loss,
        data: Any,
        members: list[Member],
        whole: int | None,
    ) -> None:
        self.models, self.recipe, self.loss, self.data = models, members[0].recipe, loss, data
        self.members, self.whole = members, whole
        named = [dict(model.named_parameters()) for model in models]
        buffers = [dict(model.named_buffers()) for model in models]
        trained = [name for name, parameter in named[0].items() if parameter.requires_grad]
        with torch.no_grad():
            self.trained = {name: torch.stack([p[name] for p in named]) for name in trained}
            self.fixed = {
                name: torch.stack([given[name] for given in source])
                for source in (named, buffers)
                for name in source[0]
                if name not in self.trained
            }

    def train(self, stop: Event) -> None:
        """Train all of them and give the models their weights; or return early when stopped."""
        recipe, examples = self.recipe, len(self.members[0].index)
        per_epoch, step = recipe.steps(examples), 0
        optimizer = recipe.optimizer_of(self.trained.values(), fused=True)
        drawn = [orders(member.index, member.seed, self.whole) for member in self.members]
        for epoch in range(1, recipe.epochs + 1):
            order = torch.stack([next(each) for each in drawn])
            total = torch.zeros(len(self.models), device=order.device)
            for chosen in torch.split(order, recipe.batch, dim=1):
                if stop.is_set():
                    return
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate(step, per_epoch)
                total = total + self._gradients(chosen).to(total)
                optimizer.step()
                step += 1
            for value, member in zip(total, self.members, strict=True):
                require_finite(value, epoch, f"{examples} examples, seed {member.seed}")
        self._give_back()

    def _gradients(self, chosen: Tensor) -> Tensor:
        """Set the gradient of each model on its batch, ``chosen [M, B]``; return losses ``[M]``."""
        rows = chosen.flatten()
        tensors: list[Tensor] = []
        losses: Tensor

        def gather(tensor: Tensor) -> None:
            picked = tensor.index_select(0, rows.to(tensor.device))
            tensors.append(picked.reshape(*chosen.shape, *tensor.shape[1:]))

        map_tensors(gather, self.data)
        try:
            slopes, losses = vmap(grad_and_value(self._objective))(
                self.trained, self.fixed, tensors
            )
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise InputError(
                f"stacked training: {type(self.models[0]).__name__} cannot be vmapped ({error}); "
                "train the models one by one with together=1"
            ) from error
        scale = self._shrink(slopes)
        for name, parameter in self.trained.items():
            slope = slopes[name]
            if scale is not None:
                slope *= scale.reshape(-1, *[1] * (slope.dim() - 1))
            parameter.grad = slope.contiguous()  # a fused step reads it as it lies in memory
        return losses

    def _objective(self, trained: StateDict, fixed: StateDict, tensors: Sequence[Tensor]) -> Tensor:
        def model(*args: Any, **kwargs: Any) -> Any:
            placed = at_every_place(self.models[0], {**fixed, **trained})
            return functional_call(self.models[0], placed, args, kwargs, tie_weights=False)

        given = iter(tensors)
        return mean_loss(self.loss, model, map_tensors(lambda _: next(given), self.data))

    def _shrink(self, slopes: StateDict) -> Tensor | None:
        """Return by what each model's gradient is multiplied to be no longer than ``clip``."""
        if self.recipe.clip is None:
            return None
        norms = [torch.linalg.vector_norm(slope.flatten(1), dim=1) for slope in slopes.values()]
        norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        return torch.clamp_max(self.recipe.clip / (norm + 1e-6), 1.0)  # as clip_grad_norm_ has it

    @torch.no_grad()
    def _give_back(self) -> None:
        for k, model in enumerate(self.models):
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                source = self.trained if name in self.trained else self.fixed
                tensor.copy_(source[name][k])
