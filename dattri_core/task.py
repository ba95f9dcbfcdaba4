"""Task: what is attributed: a model, its loss, its target, its checkpoints and parameters."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dattri_core.checkpoint import Checkpoint, checkpoints_of
from dattri_core.errors import InputError
from dattri_core.losses import AnyLoss, FunctionalLoss, Loss, Target
from dattri_core.shipped_losses import as_loss, as_target


class Task:
    """A trained model and what to ask of it.

    The model is never changed: no wrapper, no hook left behind, no other ``requires_grad``, and its
    ``train()`` state is restored. It is evaluated in ``eval()`` mode.

    Args:
        model: The module. Its current weights are the checkpoint unless ``checkpoints`` is given.
        loss: The train loss: the name of a shipped loss (``"cross-entropy"``, ``"squared-error"``
            (1/2 sum (f - y)^2 over the outputs),
            ``"causal-lm"``, ``"token-cross-entropy"``), a function ``(model, batch) -> [B]``, a
            `Loss`, or a function of parameters marked with `functional`.
        target: What is attributed, per test example; default the loss, or what a method has of its
            own (the margin of TRAK, an output of RPS). A name (``"loss"``, ``"logit"``,
            ``"margin"``) or a `Target`.
        checkpoints: A file, a pattern, a folder, a state dict, or a list of them; safetensors or
            weights-only torch files. A folder that a trainer wrote is one checkpoint, its weights
            whole, in shards with an index, or those of an adapter of a ``PeftModel``. Or a sequence
            of `Checkpoint`, which have learning rates, and the steps taken from them, of their own.
        learning_rates: One for each checkpoint, for methods that weigh checkpoints by it.
        optimisers: One for each checkpoint, for sources whose rows know the state of Adam: an
            `AdamState`, or the path of its file.
        parameters: Patterns of parameter names to attribute through (``"fc*"``, ``"*.weight"``);
            one that begins with ``!`` excludes. Frozen parameters never take part.
        reference: Examples like those that will be asked, for curvatures that see both sides
            (``mixed``): a Dataset, a DataLoader in a fixed order, or a nest of tensors.

    Raises:
        InputError: A pattern matches nothing, a checkpoint does not exist, and the like.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | AnyLoss = "cross-entropy",
        *,
        target: str | Target | None = None,
        checkpoints: Any = None,
        learning_rates: Sequence[float] | None = None,
        optimisers: Any = None,
        parameters: str | Sequence[str] = "*",
        reference: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"task: model is a {type(model).__name__}, expected a torch.nn.Module")
        self.model = model
        self.loss = as_loss(loss)
        self.target = as_target(target)
        self.names_loss = target is not None and self.target is None
        self.checkpoints: tuple[Checkpoint, ...] = checkpoints_of(
            checkpoints, learning_rates, optimisers
        )
        self.parameter_names = select_parameters(model, parameters)
        self.reference = reference
        self.device = _device_of(model)

    def with_(self, *, loss: AnyLoss, target: Target | None) -> Task:
        """Return the same model and checkpoints with another loss and target.

        For sources whose rows are of another function than the loss.
        """
        changed = copy.copy(self)
        changed.loss, changed.target, changed.names_loss = loss, target, False
        return changed

    @property
    def named_target(self) -> Target | None:
        """Return the target that was named, be it the loss; None where a method may choose."""
        if not self.names_loss or not callable(self.loss):
            return self.target
        return Target(self.loss, higher_is_better=False, name=self.loss_name)

    @property
    def sign(self) -> float:
        """Return -1 when more of the target is better, so that a positive score always helps."""
        return -1.0 if self.target is not None and self.target.higher_is_better else 1.0

    @property
    def splits_loss(self) -> bool:
        """Return whether outputs and criterion of the loss are known apart, as a GGN needs."""
        return isinstance(self.loss, Loss)

    @property
    def loss_name(self) -> str:
        """Return how results call the loss."""
        if isinstance(self.loss, (Loss, FunctionalLoss)):
            return self.loss.name
        return getattr(self.loss, "__name__", type(self.loss).__name__)

    @property
    def target_name(self) -> str:
        """Return how results call the target."""
        return self.loss_name if self.target is None else self.target.name


def select_parameters(model: nn.Module, patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Return the trainable parameters that the patterns choose, in the model's order.

    Raises:
        InputError: A pattern matches no parameter, or only frozen ones, or nothing is left.
    """
    given = [patterns] if isinstance(patterns, str) else patterns
    listed = list(given) if isinstance(given, Iterable) else []
    if not listed or not all(isinstance(pattern, str) for pattern in listed):
        raise InputError(
            f"parameters: got {patterns!r}; give one or more patterns of parameter names such as "
            "'fc*', or '*' for all"
        )
    patterns = listed
    everything = dict(model.named_parameters())
    unmade = [name for name, p in everything.items() if is_lazy(p)]
    if unmade:
        raise InputError(
            f"parameters: {_some(unmade)} of a lazy module have no shape yet; run the model on a "
            "batch first"
        )
    trainable = {name for name, p in everything.items() if p.requires_grad}
    for pattern in patterns:
        hits = fnmatch.filter(everything, pattern.removeprefix("!"))
        if not hits and everything:
            raise InputError(
                f"parameters: the pattern {pattern!r} matches none of {_some(list(everything))}"
            )
        if not pattern.startswith("!") and everything and not trainable.intersection(hits):
            raise InputError(
                f"parameters: the pattern {pattern!r} matches only frozen parameters "
                f"({_some(hits)}); set requires_grad on those that were trained"
            )
    including = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]
    excluding = [pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")]
    chosen = tuple(
        name
        for name in everything
        if name in trainable
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in including)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in excluding)
    )
    if not chosen:
        raise InputError(
            f"parameters: nothing to attribute through; the patterns {patterns} leave none of "
            f"{len(everything)} parameters, {len(trainable)} of them trainable"
        )
    imaginary = [name for name in chosen if everything[name].is_complex()]
    if imaginary:
        raise InputError(
            f"parameters: {_some(imaginary)} are complex, and scores are inner products of real "
            "gradients; hold them as real numbers, torch.view_as_complex(self.weight) in forward, "
            f"or leave them out with parameters='!{imaginary[0]}'"
        )
    return chosen


def _some(names: Sequence[str], count: int = 12) -> str:
    shown = ", ".join(names[:count])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > count else shown


def _device_of(model: nn.Module) -> torch.device:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise InputError(
            f"task: the model lies on several devices ({sorted(map(str, devices))}); "
            "move it to one with model.to(device)"
        )
    if any(device.type == "meta" for device in devices):
        raise InputError("task: the model is on the device 'meta' and holds no weights; load them")
    return devices.pop() if devices else torch.device("cpu")
