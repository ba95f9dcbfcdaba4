"""Per-example gradients by ``torch.func``: vmap of grad, for any function of the parameters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from attrs import define, field, frozen
from torch import Tensor, nn
from torch.func import grad, vmap

from dattri_core import (
    Block,
    Checkpoint,
    DattriError,
    DenseBlock,
    Evaluator,
    InputError,
    Space,
    SpecError,
    Task,
    is_out_of_memory,
    leaves,
    map_tensors,
    take,
)
from dattri_parts.sources.axes import EXAMPLES
from dattri_parts.sources.blocks import dense_spec
from dattri_parts.sources.fallback import FAILURES
from dattri_parts.sources.finite import plain, require_finite

Role = Literal["train", "test"]
Sink = Callable[[str, Block], None]
Named = dict[str, Tensor]
Objective = Callable[[nn.Module, Named, Any], Tensor]
"""The model, its weights swapped, these weights and one example to what is differentiated."""
_log = logging.getLogger("dattri")


@frozen
class Functional:
    """Rows g_b = d loss_b / d parameters by vmap(grad(loss)) of the whole model; blocks are formed.

    It takes any loss, and parameters used in any way. Where an operation refuses
    ``torch.func.vmap`` (``.item()``, a branch on a value, a write in place), examples are
    differentiated one after another by plain autograd, which takes longer and is said in the log.
    Each block is one parameter. A batch's rows are all alive at once.

    Args:
        chunk: Examples differentiated side by side; None takes the whole batch at once. It bounds
            the activations, not the rows.
    """

    chunk: int | None = field(default=None)
    provides: ClassVar[frozenset[str]] = frozenset()

    @chunk.validator
    def _positive(self, _: Any, value: int | None) -> None:
        if value is not None and value < 1:
            raise SpecError(f"functional: chunk is {value}; give a number of examples, or None")

    def bind(self, task: Task, checkpoint: Checkpoint, sample: Any) -> BoundFunctional:
        """Fix the source to one checkpoint, and try it on a few examples.

        Raises:
            InputError: The loss is unfit (see `Evaluator`), or it cannot be differentiated.
        """
        with torch.inference_mode(False):
            evaluator = Evaluator(task, checkpoint, plain(sample))
            sample = plain(take(sample, slice(0, EXAMPLES)))
            specs = [dense_spec(k, k, tuple(p.shape)) for k, p in evaluator.selected.items()]
            bound = BoundFunctional(evaluator, Space(tuple(specs)), self.chunk)
            roles: tuple[Role, ...] = ("train", "test") if task.target is not None else ("train",)
            for role in roles:
                bound.stream(sample, role, _drop)
        return bound

    def move(self, bound: BoundFunctional, checkpoint: Checkpoint) -> BoundFunctional:
        """Return the source at other weights of the model."""
        return BoundFunctional(
            bound.evaluator.moved_to(checkpoint), bound.space, bound.chunk, bound.refused
        )


@define(eq=False)
class BoundFunctional:
    """`Functional` at one checkpoint."""

    evaluator: Evaluator
    space: Space
    chunk: int | None
    refused: set[str] = field(factory=set)
    """What cannot run side by side (loss, target or forward pass), learned at the first batch."""

    def stream(self, batch: Any, role: Role, sink: Sink) -> Mapping[str, Tensor]:
        """Hand one block for each parameter to the sink.

        Raises:
            InputError: The loss or target cannot be differentiated.
            NumericsError: A gradient is not finite; checkpoint, block and example are named.
        """
        batch = plain(batch)

        def total(model: nn.Module, parameters: Named, single: Any) -> Tensor:
            value: Tensor = self.evaluator.total_of(model, single, role, parameters)
            return value

        what = "loss" if role == "train" else "target"
        self._run(total, batch, sink, (what, f"rows of role {role!r}"))
        return {}

    def pull(self, batch: Any, cotangent: Callable[[Tensor], Tensor], sink: Sink) -> None:
        """Hand one block for each parameter of the rows J_b^T u_b to the sink.

        The outputs are computed once more beforehand, since u is a function of all of them.

        Args:
            batch: Examples.
            cotangent: Outputs of the loss's forward pass ``[B, ...]`` to u of the same shape, which
                is held constant.
            sink: Takes each block once.

        Raises:
            InputError: The loss is not split in outputs and criterion, or cannot be differentiated.
            NumericsError: A gradient is not finite; checkpoint, block and example are named.
        """
        batch = plain(batch)
        with self.evaluator.session(), torch.inference_mode(False), torch.no_grad():
            outputs = self.evaluator.outputs(None, batch)
        with torch.enable_grad():
            direction = cotangent(outputs)

        def total(model: nn.Module, parameters: Named, single: Any) -> Tensor:
            del parameters  # they are in the model
            example, u = single
            value: Tensor = self.evaluator.pulled_of(model, example, lambda _: u)
            return value

        self._run(total, (batch, direction.detach()), sink, ("forward pass", "rows of outputs"))

    def _run(self, objective: Objective, examples: Any, sink: Sink, names: tuple[str, str]) -> None:
        """Hand over the gradient of the objective for each example."""
        what, rows = names

        def once(watched: Sink) -> None:
            found = self._gradients(objective, examples, what)
            for name in self.space.names:
                watched(name, DenseBlock(found.pop(name)))

        require_finite(once, sink, self.evaluator.checkpoint, rows)

    def _gradients(self, objective: Objective, examples: Any, what: str) -> Named:
        tensors: list[Tensor] = []
        map_tensors(tensors.append, examples)

        def one(example: list[Tensor]) -> Any:
            rest = iter(example)
            return map_tensors(lambda _: next(rest).unsqueeze(0), examples)

        with self.evaluator.session(), torch.inference_mode(False), torch.enable_grad():
            if what in self.refused:
                return self._in_turn(objective, tensors, one)
            try:
                return self._side_by_side(objective, tensors, one)
            except DattriError:
                raise
            except FAILURES as error:
                if is_out_of_memory(error):  # the engine halves the batch and tries again
                    raise
                refusal = str(error).strip().splitlines()[0]
            try:
                found = self._in_turn(objective, tensors, one)
            except FAILURES as error:
                if isinstance(error, DattriError) or is_out_of_memory(error):
                    raise
                raise InputError(
                    f"functional: the {what} cannot be differentiated: "
                    f"{str(error).strip().splitlines()[0]} (and under torch.func.vmap: {refusal}); "
                    "write the operation so that autograd has a derivative of it, or leave its "
                    "parameters out with parameters=..."
                ) from error
        self.refused.add(what)
        _log.info(
            "functional: the %s is differentiated one example after another, since it refuses "
            "torch.func.vmap (%s)",
            what,
            refusal,
        )
        return found

    def _side_by_side(
        self, objective: Objective, tensors: list[Tensor], one: Callable[[list[Tensor]], Any]
    ) -> Named:
        def total(parameters: Named, example: list[Tensor]) -> Tensor:
            single = one(example)
            value: Tensor = self.evaluator.call(
                lambda model: objective(model, parameters, single), parameters
            )
            return value

        rows = vmap(grad(total), in_dims=(None, 0), chunk_size=self.chunk)
        found: Named = rows(dict(self.evaluator.selected), tensors)
        return {name: value.detach() for name, value in found.items()}

    def _in_turn(
        self, objective: Objective, tensors: list[Tensor], one: Callable[[list[Tensor]], Any]
    ) -> Named:
        selected = self.evaluator.selected
        rows = {name: p.new_zeros(len(tensors[0]), *p.shape) for name, p in selected.items()}
        for b in range(len(tensors[0])):
            parameters = leaves(selected)
            self.evaluator.call(
                _both_ways(objective, parameters, one([t[b] for t in tensors])), parameters
            )
            for name, p in parameters.items():
                if p.grad is not None:
                    rows[name][b] = p.grad.to_dense() if p.grad.is_sparse else p.grad
        return rows


def _both_ways(objective: Objective, parameters: Named, single: Any) -> Callable[[nn.Module], None]:
    """Return the passes of one example, to run inside `Evaluator.call`.

    Both of them: activations that are computed again must meet the same weights.
    """

    def run(model: nn.Module) -> None:
        total = objective(model, parameters, single)
        if total.requires_grad:
            torch.autograd.backward(total)

    return run


def _drop(name: str, block: Block) -> None:
    pass
