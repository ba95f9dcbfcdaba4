"""Gradients of the last layer, after it was fitted again with an L2 penalty."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from attrs import evolve, field, frozen, validators
from dattri_parts.sources.finite import plain, require_finite
from torch import Tensor, nn

from dattri_core import (
    Block,
    BlockSpec,
    BoundSource,
    Checkpoint,
    Evaluator,
    Examples,
    InputError,
    Loss,
    MemoryBudgetError,
    OuterBlock,
    Space,
    SpecError,
    Target,
    Task,
    format_bytes,
    labels_of,
    map_tensors,
)
from dattri_rps.head import Head, find_head
from dattri_rps.refit import Part, refit

Role = Literal["train", "test"]
Sink = Callable[[str, Block], None]
SAMPLE = 3
FEATURES_AT_ONCE = 1024


@frozen
class LastLayer:
    """Rows (dL_i/doutputs) f_i^T of the last layer W, at the W that a penalty makes a minimum.

    W minimises 1/n sum_i L(W f_i) + l2 |W|^2 over the train set, in float64, with the rest of the
    network held fixed. f = (x, 1) are the inputs of the layer and, where it has a bias, a 1, so
    that the bias is a column of W and is penalised like the others. At that minimum

        W = sum_i alpha_i f_i^T,    alpha_i = -1/(2 l2 n) dL_i/doutputs,

    and every output is a sum over the train set: W f_j = sum_i alpha_i f_i^T f_j. Rows come with
    the number ``scale`` = 1/(2 l2 n) that the scorer ``representer`` multiplies by. How well the
    identity holds is measured after the fit (``representer_gap`` in ``provenance["source"]``). The
    layer is the ``nn.Linear`` whose outputs the criterion takes, whatever parameters the task
    selects; the user's model keeps its own.

    L is the loss of the task on its labels, not on the predictions of the model, which the paper
    takes for a network that is trained already: alpha_i says how far the layer is from the label of
    example i, so that a wrong label shows; of predictions no label would be read.

    Test rows are of the target of the task; without one, of an output, of which more is better.

    Source: Yeh et al. 2018, Representer Point Selection for Explaining Deep Neural Networks,
    section 3 (arXiv 1811.09720), whose lambda is ``l2``.

    Args:
        target: Which output test rows are of where the task has no target: ``"label"``, that of the
            class of each test example (the only output, where there is one), or its number.
        l2: Of the penalty.
        gradient_norm: L-BFGS stops where the norm of the gradient is at most this share of that of
            the penalty, |2 l2 W|. W then differs from the sum by this share of its norm.
        iterations: Most steps of L-BFGS.
    """

    target: int | Literal["label"] = field(default="label")
    l2: float = field(default=3e-3, validator=validators.gt(0))
    gradient_norm: float = field(default=1e-8, validator=validators.gt(0))
    iterations: int = field(default=1000, validator=validators.ge(1))
    provides: ClassVar[frozenset[str]] = frozenset({"scale"})

    @target.validator
    def _output(self, _: object, value: object) -> None:
        if value != "label" and (isinstance(value, bool) or not isinstance(value, int)):
            raise SpecError(
                f"last-layer: target is {value!r}; give 'label' or the number of an output, or "
                "dattri.Task(..., target=...) for anything else"
            )

    def bind(self, task: Task, checkpoint: Checkpoint, sample: Any) -> BoundSource:
        """Raise `SpecError`: a layer is fitted on the whole train set, see `fit`."""
        raise SpecError(
            "source 'last-layer': it is fitted on the whole train set, and a source around it "
            "shows it a few examples; use it alone, as the source of the method"
        )

    def fit(
        self, task: Task, checkpoint: Checkpoint, examples: Examples, memory: int
    ) -> BoundLastLayer:
        """Fit the last layer again on the features of the train set.

        Args:
            task: Its loss must have outputs and criterion apart.
            checkpoint: One of its checkpoints; the features are those of its network.
            examples: The train set.
            memory: Bytes for the features of the whole train set.

        Raises:
            SpecError: The loss is not split, no linear layer gives its outputs, or the target does
                not say which output is meant.
            InputError: The loss is unfit, see `Evaluator`.
            MemoryBudgetError: The features do not fit.
            NumericsError: The features or the fitted layer are not finite.
        """
        loss = task.loss
        if not isinstance(loss, Loss):
            raise SpecError(
                f"source 'last-layer': the loss {task.loss_name!r} does not tell the outputs of "
                "the last layer from what becomes of them; give dattri.Loss(forward=..., "
                "criterion=...) or a shipped loss by name"
            )
        with torch.inference_mode(False):
            sample = self._on_device(task, examples.sample(SAMPLE))
            evaluator = Evaluator(task, checkpoint, sample)
            name, layer = find_head(evaluator, loss, sample)
            bias = layer.bias is not None
            width = layer.in_features + bias
            weight = torch.zeros(layer.out_features, width, dtype=torch.float64, device=task.device)
            head = Head(weight, bias)
            target = task.named_target or self._target(loss, layer.out_features, evaluator, sample)
            # As a hook of its checkpoint the layer is part of the network that is evaluated, of
            # the outputs that a curvature of drawn labels sees too.
            changed = evolve(checkpoint, hooks={**checkpoint.hooks, name: head})
            evaluator = Evaluator(task.with_(loss=loss, target=target), changed, sample)
            parts = self._parts(evaluator, head, examples, memory)
            found = refit(
                parts,
                loss.criterion,
                layer.out_features,
                l2=self.l2,
                gradient_norm=self.gradient_norm,
                iterations=self.iterations,
                memory=memory,
            )
        head.weight = found.weight
        space = Space((BlockSpec(name or "last-layer", "outer", (layer.out_features, width)),))
        scale = 1 / (2 * self.l2 * len(examples))
        return BoundLastLayer(evaluator, head, space, scale, found.stats)

    def _parts(
        self, evaluator: Evaluator, head: Head, examples: Examples, memory: int
    ) -> list[Part]:
        """Return the features of the train set, and what the criterion reads of it."""
        parts: list[Part] = []
        held, task = 0, evaluator.task
        for _, given in examples.batches(FEATURES_AT_ONCE):
            batch = self._on_device(task, given)
            with evaluator.session(), torch.no_grad():
                evaluator.outputs(None, batch)
            features, _ = head.seen()
            parts.append(Part(features, batch))
            held += features.nbytes + (0 if examples.kind == "tensors" else _bytes(batch))
            if held > memory:
                need = held * len(examples) / sum(len(part.features) for part in parts)
                raise MemoryBudgetError(
                    f"source 'last-layer': the features of {len(examples)} train examples take "
                    f"{format_bytes(need)} of a budget of {format_bytes(memory)}; give a larger "
                    "memory="
                )
        return parts

    def _on_device(self, task: Task, batch: Any) -> Any:
        return plain(map_tensors(lambda t: t.to(task.device), batch))

    def _target(self, loss: Loss, outputs: int, evaluator: Evaluator, sample: Any) -> Target:
        """Return the output that test rows are of."""
        with evaluator.session(), torch.no_grad():
            axes = evaluator.outputs(None, sample).dim()
        if axes != 2:
            raise SpecError(
                f"source 'last-layer': an example has {axes - 1} axes of outputs, and target "
                f"{self.target!r} names one of a single axis; give dattri.Task(..., target="
                "dattri.Target(function, higher_is_better=True)), one number per example"
            )
        if isinstance(self.target, int):
            if not 0 <= self.target < outputs:
                raise SpecError(
                    f"source 'last-layer': target is {self.target}, and the layer has {outputs} "
                    f"outputs; give a number from 0 to {outputs - 1}, or 'label'"
                )
        elif outputs > 1 and not _has_classes(sample):
            raise SpecError(
                f"source 'last-layer': target 'label' is the output of an example's class, and the "
                f"labels are no classes of {outputs} outputs; give the number of an output, "
                "target=0"
            )
        name = f"output {self.target}" if isinstance(self.target, int) else "output of the label"
        return Target(_Output(loss, self.target), higher_is_better=True, name=name)


@frozen
class _Output:
    """One output of each example, ``[B]``."""

    loss: Loss
    which: int | Literal["label"]

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        outputs = self.loss.forward(model, batch)
        if isinstance(self.which, int):
            return outputs[:, self.which]
        if outputs.shape[1] == 1:
            return outputs[:, 0]
        labels = labels_of(batch).to(outputs.device)
        if bool(((labels < 0) | (labels >= outputs.shape[1])).any()):
            raise InputError(
                f"target 'label': the labels are {labels.tolist()[:8]}..., expected classes from 0 "
                f"to {outputs.shape[1] - 1}; give the number of an output, target=0"
            )
        return outputs.gather(1, labels.unsqueeze(1)).squeeze(1)


@frozen(eq=False)
class BoundLastLayer:
    """`LastLayer` at one checkpoint, fitted.

    Args:
        evaluator: Of the network with the fitted layer.
        head: The fitted layer.
        space: One block, W.
        scale: 1 / (2 l2 n).
        stats: What the fit reached, see `Refit`.
    """

    evaluator: Evaluator
    head: Head
    space: Space
    scale: float
    stats: Mapping[str, float]
    dtype: ClassVar[torch.dtype] = torch.float64
    """Of the rows: the fitted layer, and so the slopes at it, are in float64 in any model."""

    def stream(self, batch: Any, role: Role, sink: Sink) -> Mapping[str, Tensor]:
        """Hand the block of a batch to the sink, as factors in float64.

        Raises:
            NumericsError: A gradient is not finite; checkpoint and example are named.
        """
        batch = plain(batch)

        def slope(outputs: Tensor, values: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(values.sum(), outputs)
            return found

        features = self._run(
            lambda: self.evaluator.per_example(None, batch, role), slope, sink, role
        )
        return {"scale": features.new_full((len(features),), self.scale)}

    def pull(self, batch: Any, cotangent: Callable[[Tensor], Tensor], sink: Sink) -> None:
        """Hand the block of the rows u_b f_b^T to the sink, u = cotangent(outputs).

        Args:
            batch: Examples.
            cotangent: Outputs ``[B, ...]`` to u of the same shape.
            sink: Takes the block.
        """
        batch = plain(batch)
        self._run(
            lambda: self.evaluator.outputs(None, batch),
            lambda outputs, _: cotangent(outputs.detach()),
            sink,
            "outputs",
        )

    def _run(
        self,
        forward: Callable[[], Tensor],
        direction: Callable[[Tensor, Tensor], Tensor],
        sink: Sink,
        what: str,
    ) -> Tensor:
        """Run the network once; hand u_b f_b^T over and return the features."""
        kept: list[Tensor] = []

        def once(watched: Sink) -> None:
            with torch.inference_mode(False), torch.enable_grad(), self.evaluator.session():
                values = forward()
                features, outputs = self.head.seen()
                slopes = direction(outputs, values).detach().to(outputs.dtype)
            kept[:] = [features]
            (spec,) = self.space
            block = OuterBlock(*(_positions(factor) for factor in (slopes, features)))
            watched(spec.name, block)

        require_finite(once, sink, self.evaluator.checkpoint, f"rows of the last layer ({what})")
        return kept[0]


def _positions(factor: Tensor) -> Tensor:
    """Return ``[B, ..., D]`` as ``[B, T, D]``."""
    return factor.reshape(len(factor), math.prod(factor.shape[1:-1]), factor.shape[-1])


def _has_classes(sample: Any) -> bool:
    labels = labels_of(sample)
    return labels.dim() == 1 and not labels.is_floating_point()


def _bytes(batch: Any) -> int:
    sizes: list[int] = []
    map_tensors(lambda t: sizes.append(t.nbytes), batch)
    return sum(sizes)
