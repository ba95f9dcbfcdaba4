"""Representations: rows that are features of examples, and not gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from attrs import field, frozen, validators
from torch import Tensor, nn

from dattri_core import (
    Block,
    BlockSpec,
    Checkpoint,
    DenseBlock,
    Evaluator,
    InputError,
    NumericsError,
    Space,
    SpecError,
    Task,
    batch_size,
    labels_of,
    map_tensors,
    take,
)
from dattri_parts.sources.axes import EXAMPLES
from dattri_parts.sources.pooling import CHANNELS, POOLINGS, Channels, Pooling, pool

Role = Literal["train", "test"]
Sink = Callable[[str, Block], None]
Function = Callable[[nn.Module, Any], Tensor]
FOUND, ABSENT = "auto", "none"
"""The label that `dattri_core.labels_of` finds; no label."""
MIXED = {torch.float64: 1e-8, torch.float32: 1e-3}
"""By how much features may depend on the batch, relative to the largest number, by dtype."""


@frozen
class Representation:
    """Rows f(z_b), features of example b, one dense block; no gradient is taken.

    By default they are what the last linear layer that the model calls is given. One of ``module``,
    ``inputs`` and ``function`` asks for others. Both roles have the same features. Positions are
    pooled as asked, and padding, as an ``attention_mask`` in the batch marks it, is left out.

    Args:
        module: Name of a module, called once in a forward pass; its output, or the first tensor of
            it.
        inputs: The input itself: the one floating point tensor of the batch that is no label.
        function: ``(model, batch) -> [B, ...]``. A function cannot be written in a spec: a method
            that holds one is described, in provenance and files, by the name of the function alone
            and cannot be read back, and a store does not see that its code has changed.
        pooling: Of positions: ``"none"``, ``"mean"``, ``"last"``, ``"first"`` or ``"max"``.
        channels: Which axis of the features is not one of positions, ``"first"`` after that of the
            examples or ``"last"``; None: the last of ``[B, T, D]``, the first of ``[B, C, H, W]``.
        label: Where the label of an example is: ``"auto"``: the last item of a tuple, or the key
            ``"labels"`` or ``"label"``; a key of the batch or the position of an item;
            ``"none"``: rows come without labels.
    """

    module: str | None = None
    inputs: bool = False
    function: Function | None = None
    pooling: Pooling = field(default="none", validator=validators.in_(POOLINGS))
    channels: Channels | None = field(
        default=None, validator=validators.optional(validators.in_(CHANNELS))
    )
    label: str | int = FOUND

    @property
    def provides(self) -> frozenset[str]:
        """Return the label, unless rows come without."""
        return frozenset() if self.label == ABSENT else frozenset({"label"})

    def bind(self, task: Task, checkpoint: Checkpoint, sample: Any) -> BoundRepresentation:
        """Find the features, and try them and the labels on a few examples.

        Raises:
            SpecError: Two kinds of features are asked for, there is no such module, or features or
                labels of these examples are not what rows are made of.
            InputError: The loss is unfit (see `Evaluator`), or features mix examples.
        """
        asked = {"module": self.module, "inputs": self.inputs or None, "function": self.function}
        given = [name for name, value in asked.items() if value is not None]
        if len(given) > 1:
            raise SpecError(
                f"source 'representation': {' and '.join(given)} each say what the features are; "
                "give one of them, or none for the input of the last linear layer"
            )
        sample = take(sample, slice(0, EXAMPLES))
        evaluator = Evaluator(task, checkpoint, sample)
        name, read = self._reader(evaluator, sample)
        spec = BlockSpec(name, "dense", ())
        bound = BoundRepresentation(self, evaluator, Space((spec,)), read)
        try:
            features = bound.features(sample)
        except (TypeError, AttributeError, LookupError) as error:
            if self.function is None:
                raise
            raise SpecError(
                f"source 'representation': the function {name!r} fails on the first examples "
                f"({type(error).__name__}: {error}); it is called with the task's model and a "
                "batch as the data give it, such as function=lambda model, batch: encoder(batch[0])"
            ) from error
        bound = BoundRepresentation(
            self, evaluator, Space((BlockSpec(name, "dense", features.shape[1:]),)), read
        )
        _require_apart(features[:1], bound.features(take(sample, slice(0, 1))), name)
        if self.label != ABSENT:
            self.labels(sample)
        return bound

    def labels(self, batch: Any) -> Tensor:
        """Return the label of each example, ``[B]``.

        Raises:
            SpecError: There is none, or more than one number.
        """
        labels = _item(batch, self.label)
        if labels.numel() != batch_size(batch):
            raise SpecError(
                f"source 'representation': labels of shape {tuple(labels.shape)} for "
                f"{batch_size(batch)} examples; a scorer reads one number an example: name another "
                "with label=, or give label='none' where the scorer reads none"
            )
        return labels.reshape(-1).detach()

    def _reader(self, evaluator: Evaluator, sample: Any) -> tuple[str, Callable[[Any], Tensor]]:
        """Return a name for the features, and what gives those of a batch before pooling."""
        function = self.function
        if function is not None:
            name = getattr(function, "__name__", "function")
            return name, lambda batch: evaluator.call(lambda model: function(model, batch))
        if self.inputs:
            return "inputs", self._input
        model = evaluator.task.model
        name = _last_linear(evaluator, sample) if self.module is None else self.module
        modules = dict(model.named_modules())
        if name not in modules:
            raise SpecError(
                f"source 'representation': the model has no module {name!r}; it has "
                f"{[key for key in modules if key][:12]}"
            )
        module, is_input = modules[name], self.module is None
        shown = f"{name}.input" if is_input else name
        return shown, lambda batch: _watched(evaluator, module, shown, batch, is_input=is_input)

    def _input(self, batch: Any) -> Tensor:
        label = _item_or_none(batch, self.label)
        found: list[Tensor] = []
        map_tensors(found.append, batch)
        floating = [t for t in found if t.is_floating_point() and not _same(t, label)]
        if len(floating) != 1:
            raise SpecError(
                "source 'representation': inputs=True needs one floating point tensor beside the "
                f"label, the batch has tensors of {[(tuple(t.shape), t.dtype) for t in found]}; "
                "give module= (of an embedding, say), or function=lambda model, batch: ..."
            )
        return floating[0]


@frozen(eq=False)
class BoundRepresentation:
    """`Representation` at one checkpoint.

    Args:
        part: What is asked for.
        evaluator: Of the task.
        space: One dense block.
        read: Gives the features of a batch, before pooling.
    """

    part: Representation
    evaluator: Evaluator
    space: Space
    read: Callable[[Any], Tensor]

    def stream(self, batch: Any, role: Role, sink: Sink) -> Mapping[str, Tensor]:
        """Hand over the features of a batch, the same in both roles; return their labels.

        Raises:
            InputError: Features are not of the shape that those of the first examples had.
            NumericsError: A feature is not finite; checkpoint, block and examples are named.
        """
        (spec,) = self.space
        features = self.features(batch)
        if tuple(features.shape[1:]) != spec.shape:
            raise InputError(
                f"source 'representation': features {spec.name!r} of shape "
                f"{tuple(features.shape[1:])}, those of the first examples have {spec.shape}; rows "
                "have one shape: pool the positions (pooling='mean'), or pad all examples alike"
            )
        finite = torch.isfinite(features).flatten(1).all(1)
        if not bool(finite.all()):
            raise NumericsError(
                f"source 'representation': features {spec.name!r} are not finite at checkpoint "
                f"{self.evaluator.checkpoint.name!r}, examples "
                f"{(~finite).nonzero().flatten().tolist()[:8]} of the batch; look for a diverged "
                "checkpoint, or for inputs that are not finite"
            )
        sink(spec.name, DenseBlock(features))
        return {} if self.part.label == ABSENT else {"label": self.part.labels(batch)}

    def features(self, batch: Any) -> Tensor:
        """Return the features of a batch, pooled, ``[B, ...]``.

        Raises:
            SpecError: They are no floating point numbers, one row an example.
        """
        with self.evaluator.session(), torch.no_grad():
            features = self.read(batch)
        if (
            not isinstance(features, Tensor)
            or features.dim() < 2
            or len(features) != batch_size(batch)
            or not features.is_floating_point()
        ):
            shape = (
                f"{features.dtype} of shape {tuple(features.shape)}"
                if isinstance(features, Tensor)
                else type(features).__name__
            )
            raise SpecError(
                f"source 'representation': features are {shape} for {batch_size(batch)} examples; "
                "expected floating point numbers [B, ...], the first axis that of the examples; "
                "name another module=, or give function=lambda model, batch: ..."
            )
        return pool(features.detach(), self.part.pooling, self.part.channels, batch)


def _watched(
    evaluator: Evaluator, module: nn.Module, name: str, batch: Any, *, is_input: bool
) -> Tensor:
    """Return what a module gives, or is given, in a forward pass of the loss."""
    seen: list[Any] = []

    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found: list[Tensor] = []
        map_tensors(found.append, (args, kwargs) if is_input else output)
        seen.append(found[0] if found else None)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        evaluator.call(lambda model: evaluator.values(model, batch, "train"))
    finally:
        handle.remove()
    if not seen or (len(seen) > 1 and not is_input):
        raise SpecError(
            f"source 'representation': the module {name!r} was called {len(seen)} times in a "
            "forward pass, expected once; name another module=, or give function=lambda model, "
            "batch: ..."
        )
    features: Tensor = seen[-1]
    return features


def _last_linear(evaluator: Evaluator, sample: Any) -> str:
    """Return the name of the linear layer that a forward pass calls last.

    Raises:
        SpecError: It calls none.
    """
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in evaluator.task.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with evaluator.session(), torch.no_grad():
            evaluator.call(lambda model: evaluator.values(model, sample, "train"))
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise SpecError(
            "source 'representation': the model calls no torch.nn.Linear whose input could be the "
            "features; give module=, the name of the module whose output is"
        )
    return called[-1]


def _item(batch: Any, label: str | int) -> Tensor:
    if label in (FOUND, ABSENT):
        try:
            return labels_of(batch)
        except InputError as error:
            raise SpecError(
                f"source 'representation': {error}; name the label with label=, or give "
                "label='none' where the scorer reads none"
            ) from error
    try:
        return torch.as_tensor(batch[label])
    except (KeyError, IndexError, TypeError) as error:
        kind = sorted(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise SpecError(
            f"source 'representation': label={label!r} is in no place of the batch, {kind}; give a "
            "key of it or the position of an item"
        ) from error


def _item_or_none(batch: Any, label: str | int) -> Tensor | None:
    """Return the label, or where rows come without, what would be taken for it."""
    try:
        return _item(batch, label)
    except SpecError:
        if label == ABSENT:
            return None
        raise


def _same(tensor: Tensor, label: Tensor | None) -> bool:
    return label is not None and tensor.data_ptr() == label.data_ptr()


def _require_apart(among: Tensor, alone: Tensor, name: str) -> None:
    """Raise unless an example has the same features in a batch of its own."""
    if alone.shape != among.shape:
        return  # padding: what is asked of a batch is checked when it comes
    size = float(among.abs().max())
    gap = float((among - alone).abs().max())
    if gap > MIXED.get(among.dtype, 5e-2) * size:
        raise InputError(
            f"source 'representation': the features {name!r} mix examples: those of the first "
            f"differ by {gap:.3g} when it is alone (the largest number is {size:.3g}); look for "
            "statistics or sums over the batch, or name another module"
        )
