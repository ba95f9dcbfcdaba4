"""Per-example gradients by ``torch.func``: vmap of grad, for any function of the parameters."""

from __future__ import annotations

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
    map_tensors,
)
from dattri_parts.sources.blocks import dense_spec
from dattri_parts.sources.finite import plain, require_finite

Role = Literal["train", "test"]
Sink = Callable[[str, Block], None]
Named = dict[str, Tensor]


@frozen
class Functional:
    """Rows g_b = d loss_b / d parameters by vmap(grad(loss)) of the whole model; blocks are formed.

    It takes any loss, and parameters used in any way, as long as every operation works under
    ``torch.func.vmap``. Each block is one parameter. A batch's rows are all alive at once.

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
            InputError: The loss is unfit (see `Evaluator`), or an operation refuses vmap.
        """
        with torch.inference_mode(False):
            sample = plain(sample)
            evaluator = Evaluator(task, checkpoint, sample)
            specs = [dense_spec(k, k, tuple(p.shape)) for k, p in evaluator.selected.items()]
            bound = BoundFunctional(evaluator, Space(tuple(specs)), self.chunk)
            roles: tuple[Role, ...] = ("train", "test") if task.target is not None else ("train",)
            for role in roles:
                bound.stream(sample, role, _drop)
        return bound

    def move(self, bound: BoundFunctional, checkpoint: Checkpoint) -> BoundFunctional:
        """Return the source at other weights of the model."""
        return BoundFunctional(bound.evaluator.moved_to(checkpoint), bound.space, bound.chunk)


@define(eq=False)
class BoundFunctional:
    """`Functional` at one checkpoint."""

    evaluator: Evaluator
    space: Space
    chunk: int | None

    def stream(self, batch: Any, role: Role, sink: Sink) -> Mapping[str, Tensor]:
        """Hand one block for each parameter to the sink.

        Raises:
            InputError: An operation refuses vmap; it is named.
            NumericsError: A gradient is not finite; checkpoint, block and example are named.
        """
        batch = plain(batch)

        def total(parameters: Named, single: Any) -> Tensor:
            value: Tensor = self.evaluator.total(parameters, single, role)
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
            InputError: The loss is not split in outputs and criterion, or an operation refuses
                vmap; it is named.
            NumericsError: A gradient is not finite; checkpoint, block and example are named.
        """
        batch = plain(batch)
        with self.evaluator.session(), torch.inference_mode(False), torch.no_grad():
            outputs = self.evaluator.outputs(None, batch)
        with torch.enable_grad():
            direction = cotangent(outputs)

        def total(parameters: Named, single: Any) -> Tensor:
            example, u = single

            def pulled(model: nn.Module) -> Tensor:
                found: Tensor = self.evaluator.pulled_of(model, example, lambda _: u)
                return found

            value: Tensor = self.evaluator.call(pulled, parameters)
            return value

        self._run(total, (batch, direction.detach()), sink, ("forward pass", "rows of outputs"))

    def _run(
        self,
        total: Callable[[Named, Any], Tensor],
        examples: Any,
        sink: Sink,
        names: tuple[str, str],
    ) -> None:
        """Hand over the gradient of ``total(parameters, one example)`` for each example."""
        what, rows = names

        def once(watched: Sink) -> None:
            found = self._gradients(total, examples, what)
            for name in self.space.names:
                watched(name, DenseBlock(found.pop(name)))

        require_finite(once, sink, self.evaluator.checkpoint, rows)

    def _gradients(
        self, total: Callable[[Named, Any], Tensor], examples: Any, what: str
    ) -> dict[str, Tensor]:
        tensors: list[Tensor] = []
        map_tensors(tensors.append, examples)

        def one(parameters: Named, example: list[Tensor]) -> Tensor:
            rest = iter(example)
            return total(parameters, map_tensors(lambda _: next(rest).unsqueeze(0), examples))

        rows = vmap(grad(one), in_dims=(None, 0), chunk_size=self.chunk)
        try:
            with self.evaluator.session(), torch.inference_mode(False), torch.enable_grad():
                found: Named = rows(dict(self.evaluator.selected), tensors)
        except DattriError:
            raise
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            if "memory" in str(error):  # the engine halves the batch and tries again
                raise
            raise InputError(
                f"functional: the {what} cannot be differentiated under torch.func.vmap: "
                f"{str(error).strip().splitlines()[0]}; use "
                "the source 'per-example', or write the operation without data-dependent control "
                "flow, .item() and writes in place"
            ) from error
        return {name: value.detach() for name, value in found.items()}


def _drop(name: str, block: Block) -> None:
    pass
