"""Checkpoints: states of one model, loaded one at a time and checked name by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn

from dattri_core.adam_state import AdamState
from dattri_core.adapters import adapter_names, is_adapter, require_same_adapter
from dattri_core.batch import digest_of_bytes, raw_bytes
from dattri_core.errors import InputError
from dattri_core.state_files import find_states, hash_of, read_state, shapes_of

WITHIN = 1e-5
"""By how much a row may be longer than ``max_norm``, relative to it: rounding of its limit."""

StateDict: TypeAlias = Mapping[str, Tensor]
CheckpointSource: TypeAlias = "str | Path | StateDict | Checkpoint | None"
ForwardHook: TypeAlias = Callable[[nn.Module, Any, Any], Any]
"""Module, arguments and output to another output, or None; as torch has it."""


@frozen
class AdamRule:
    """How Adam and AdamW turn the mean gradient of a batch into a step, as torch has them.

    d = gradient, and with weight decay that is not decoupled + weight_decay theta; m' = b1 m + (1 -
    b1) d, v' = b2 v + (1 - b2) d^2, and after t steps theta' = theta - eta (m' / (1 - b1^t)) /
    (sqrt(v' / (1 - b2^t)) + epsilon), where decoupled decay takes eta weight_decay theta off too.

    Source: Kingma and Ba 2015, Adam: A Method for Stochastic Optimization, algorithm 1 (arXiv
    1412.6980); Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, algorithm 2
    (arXiv 1711.05101).

    Args:
        betas: (b1, b2).
        epsilon: Added to the root.
        decoupled: Whether weight decay is that of AdamW.
    """

    betas: tuple[float, float]
    epsilon: float
    decoupled: bool

    @staticmethod
    def of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> AdamRule:
        """Return the rule of a group of parameters of ``torch.optim.Adam`` or ``AdamW``."""
        beta1, beta2 = (float(beta) for beta in group["betas"])
        apart = isinstance(optimizer, torch.optim.AdamW) or bool(
            group.get("decoupled_weight_decay")  # of Adam since torch 2.6
        )
        return AdamRule((beta1, beta2), float(group["eps"]), apart)


@frozen(eq=False)
class TrainingStep:
    """The step of an optimiser that was taken from a checkpoint.

    theta' = theta - eta d with d = g + weight_decay theta, g = (scale/|B|) sum_{i in B} grad
    loss_i(theta), eta the learning rate of the checkpoint and theta' the next one. With momentum it
    is theta' = theta - eta v', v' = momentum v + (1 - dampening) d, where the first step of a run
    has v' = d; with Nesterov's, theta' = theta - eta (d + momentum v'). With `adam` it is a step of
    Adam. With `clip` g is shortened to g min(1, clip / (|g| + 1e-6)) first.

    Args:
        batch: B, positions in the train set ``[B]``, an example as often as it was drawn; None: the
            whole train set. An empty batch is no step: the end of the run.
        weight_decay: As optimisers define it; by name of parameter where they have different ones.
        epoch: Which pass over the train set the step belongs to.
        momentum: As `torch.optim.SGD` defines it, the same at all steps of a run.
        dampening: Likewise.
        nesterov: Likewise.
        adam: How Adam steps; its moments before the step are the checkpoint's `optimiser`, those
            after it the next one's. None: gradient descent.
        clip: Largest norm of the gradient of all trained parameters, as
            `torch.nn.utils.clip_grad_norm_` has it; None: any.
        scale: What was minimised over the mean loss of the batch. Of a mean over tokens, where the
            loss of an example is the sum of its own, |B| / their number.
        rates: Of parameters whose learning rate is another one, what it is over eta, by name.
    """

    batch: Tensor | None
    weight_decay: float | Mapping[str, float] = 0.0
    epoch: int = 0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    adam: AdamRule | None = None
    clip: float | None = None
    scale: float = 1.0
    rates: Mapping[str, float] = field(factory=dict)

    @property
    def linear(self) -> bool:
        """Return whether the step is a sum of gradients, as those of gradient descent are."""
        return self.adam is None and self.clip is None

    def rate_of(self, parameter: str) -> float:
        """Return the learning rate of a parameter over that of the checkpoint."""
        return self.rates.get(parameter, 1.0)

    def decay_of(self, parameter: str) -> float:
        """Return the weight decay of a parameter."""
        decay = self.weight_decay
        return float(decay.get(parameter, 0.0) if isinstance(decay, Mapping) else decay)


@frozen(eq=False)
class Checkpoint:
    """One state of the model: its place in the run, learning rate, and where its weights are."""

    name: str
    position: int
    count: int
    learning_rate: float | None
    source: Path | StateDict | None = field(repr=False)  # None: the model's current weights
    member: int = 0  # which of the networks that an `EnsembleSource` makes of it
    hooks: Mapping[str, ForwardHook] = field(factory=dict, repr=False)
    """By module name, of this network; on the model while it is evaluated and at no other time."""
    step: TrainingStep | None = field(default=None, repr=False)  # from here on, where recorded
    optimiser: AdamState | None = field(default=None, repr=False)  # where rows are to know it

    @property
    def origin(self) -> tuple[int, int]:
        """Return a key of what members of a checkpoint share: its weights and its optimiser."""
        return id(self.source), id(self.optimiser)

    def fingerprint(self, model: nn.Module) -> str:
        """Return a hash of the weights: of the file's bytes, or of names and numbers.

        Of an adapter's weights it is that of the model's others as well, and where the state of the
        optimiser is known that of its moments: other moments are other rows.
        """
        return self.with_optimiser(self._weights(model))

    def with_optimiser(self, weights: str) -> str:
        """Return a hash of weights, given theirs, and of the state of the optimiser."""
        if self.optimiser is None:
            return weights
        return hashlib.sha256(f"{weights}{self.optimiser.fingerprint}".encode()).hexdigest()

    def _weights(self, model: nn.Module) -> str:
        own, source = own_tensors(model), self.source
        if source is None:
            return state_fingerprint(own)
        said = hash_of(source) if isinstance(source, Path) else state_fingerprint(source)
        adapter = adapter_names(model, own)
        if not adapter:
            return said
        found = set(shapes_of(source) if isinstance(source, Path) else source)
        if not is_adapter(found, adapter, own):
            return said
        given = {adapter.get(key, key) for key in found}
        base = {name: tensor for name, tensor in own.items() if name not in given}
        return hashlib.sha256(f"{said}{state_fingerprint(base)}".encode()).hexdigest()

    def check(self, model: nn.Module, updated: Sequence[str] = ()) -> None:
        """Compare names and shapes with the model's, without loading the numbers where possible.

        Args:
            model: The model.
            updated: Parameters of which the optimiser must hold moments.
        """
        if self.optimiser is not None:
            self.optimiser.check(model, updated)
        if self.source is None:
            return
        if isinstance(self.source, Path):
            shapes = shapes_of(self.source)
        else:
            shapes = {name: tuple(tensor.shape) for name, tensor in self.source.items()}
        self._keys(model, shapes)

    def load(self, model: nn.Module) -> dict[str, Tensor]:
        """Return parameters and buffers by the model's own names, on the model's devices.

        Raises:
            InputError: Keys are missing, unexpected, or of another shape; each is named.
            StoreError: The file is truncated, foreign, or holds anything but tensors.
        """
        wanted = own_tensors(model)
        if self.source is None:
            return {name: tensor.detach() for name, tensor in wanted.items()}
        found = read_state(self.source) if isinstance(self.source, Path) else self.source
        keys = self._keys(model, {key: tuple(value.shape) for key, value in found.items()})
        return {
            name: found[keys[name]].detach().to(device=tensor.device, dtype=tensor.dtype)
            if name in keys
            else tensor.detach()
            for name, tensor in wanted.items()
        }

    def _keys(self, model: nn.Module, found: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Return the key of each tensor of the model; of an adapter's state, those it holds."""
        own, aliases = own_tensors(model), _aliases(model)
        adapter = adapter_names(model, own)
        partial = is_adapter(found, adapter, own)
        if partial and isinstance(self.source, Path):
            require_same_adapter(model, self.source.parent)
        keys = {
            name: next(alias for alias in aliases[name] if alias in found)
            for name in own
            if any(alias in found for alias in aliases[name])
        }
        if partial:
            keys |= {name: key for key, name in adapter.items() if key in found}
        missing = [name for name in (adapter.values() if partial else own) if name not in keys]
        known = {*model.state_dict(keep_vars=True), *(adapter if partial else ())}
        unexpected = sorted(set(found) - known)
        if missing or unexpected:
            raise InputError(_misfit(self.name, model, missing, unexpected))
        for name, key in keys.items():
            if found[key] != tuple(own[name].shape):
                raise InputError(
                    f"checkpoint {self.name!r}: {key!r} has shape {found[key]}, "
                    f"the model's has {tuple(own[name].shape)}"
                )
        return keys


def checkpoints_of(
    source: CheckpointSource | Sequence[CheckpointSource],
    learning_rates: Sequence[float] | None,
    optimisers: Any = None,
) -> tuple[Checkpoint, ...]:
    """Return the checkpoints that a path, pattern, folder, state dict or list of them names."""
    named: list[tuple[str, Path | StateDict | None]] = []
    items: Sequence[Any] = source if _is_sequence(source) else [source]  # type: ignore[assignment]
    if items and all(isinstance(item, Checkpoint) for item in items):
        return _with_optimisers(_as_given(items, learning_rates), optimisers)
    for item in items:
        named.extend(_expand(item, len(named)))
    if learning_rates is not None and len(learning_rates) != len(named):
        raise InputError(
            f"learning rates: got {len(learning_rates)} for {len(named)} checkpoints; "
            "give one for each"
        )
    if not named:
        raise InputError(
            "checkpoints: got an empty list; give at least one, or None for the weights now"
        )
    given = [None] * len(named) if learning_rates is None else learning_rates
    rates: Sequence[float | None] = [None if rate is None else float(rate) for rate in given]
    found = tuple(
        Checkpoint(name, position, len(named), rate, state)
        for position, ((name, state), rate) in enumerate(zip(named, rates, strict=True))
    )
    return _with_optimisers(found, optimisers)


def _with_optimisers(checkpoints: tuple[Checkpoint, ...], given: Any) -> tuple[Checkpoint, ...]:
    """Return checkpoints that know the state of the optimiser, where it is given."""
    if given is None:
        return checkpoints
    states = given if _is_sequence(given) else [given]
    if len(states) != len(checkpoints):
        raise InputError(
            f"optimisers: got {len(states)} for {len(checkpoints)} checkpoints; give one for each"
        )
    made = [s if isinstance(s, AdamState) else AdamState(s) for s in states]
    return tuple(evolve(c, optimiser=s) for c, s in zip(checkpoints, made, strict=True))


def _as_given(
    checkpoints: Sequence[Checkpoint], learning_rates: Sequence[float] | None
) -> tuple[Checkpoint, ...]:
    """Return checkpoints that know their rates and steps, at their places in the sequence."""
    if learning_rates is not None:
        raise InputError(
            "learning rates: the checkpoints given have their own; leave learning_rates= out"
        )
    count = len(checkpoints)
    return tuple(evolve(c, position=at, count=count) for at, c in enumerate(checkpoints))


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers, each once, under the first of its names."""
    persistent = set(model.state_dict(keep_vars=True))
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors.update((name, b) for name, b in model.named_buffers() if name in persistent)
    return tensors


def require_unwritten(model: nn.Module, state: StateDict, checkpoint: str) -> None:
    """Raise `InputError` where a forward pass would shorten rows of an embedding's weight in place.

    ``max_norm`` rewrites what it looks up: the model, or the state that was given, would change.
    """
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or module.max_norm is None:
            continue
        first = next((n for n, p in model.named_parameters() if p is module.weight), None)
        own = module.weight.detach()
        weight = own if first is None else state.get(first, own)
        lengths = torch.linalg.vector_norm(weight.float(), ord=module.norm_type, dim=1)
        longer = int((lengths > module.max_norm * (1 + WITHIN)).sum())
        if longer:
            raise InputError(
                f"checkpoint {checkpoint!r}: {longer} rows of the weight of "
                f"{type(module).__name__} {path!r} are longer than its max_norm="
                f"{module.max_norm}, and a forward pass rewrites those that it looks up, where "
                "models are left as they are; apply the limit once, with torch.no_grad(): "
                "torch.embedding_renorm_(weight, torch.arange(len(weight)), max_norm, norm_type), "
                "or set max_norm=None"
            )


def state_fingerprint(state: StateDict) -> str:
    """Return a hash of names, dtypes, shapes and numbers of a state."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(digest_of_bytes(raw_bytes(tensor)))
    return digest.hexdigest()


def _is_sequence(source: Any) -> bool:
    return isinstance(source, Sequence) and not isinstance(source, (str, bytes))


def _expand(item: Any, start: int) -> list[tuple[str, Path | StateDict | None]]:
    if item is None:
        return [("current weights", None)]
    if isinstance(item, Mapping):
        foreign = [str(k) for k, v in item.items() if not isinstance(v, Tensor)]
        if foreign:
            raise InputError(
                f"checkpoint: the state dict holds things that are no tensors: {foreign[:8]}; "
                "give model.state_dict()"
            )
        # Copied, since a state dict shares its tensors with the live model.
        return [(f"state {start}", {k: v.detach().clone() for k, v in item.items()})]
    if not isinstance(item, (str, Path)):
        raise InputError(
            f"checkpoint: got a {type(item).__name__}; give a path, a pattern, a folder, "
            "a state dict, or a list of them; or a list of dattri.Checkpoint alone"
        )
    return list(find_states(item))


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return every name of each tensor: tied weights have several, and files may hold any one."""
    by_identity: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_identity.setdefault(id(tensor), []).append(name)
    return {name: by_identity.get(id(t), [name]) for name, t in own_tensors(model).items()}


def _misfit(name: str, model: nn.Module, missing: Sequence[str], unexpected: Sequence[str]) -> str:
    parts = [f"missing {missing}"] if missing else []
    parts += [f"unexpected {unexpected}"] if unexpected else []
    fix = "save the state dict of this very model, unwrapped"
    if any(".lora_" in key for key in unexpected) and not hasattr(model, "peft_config"):
        fix = "these are weights of an adapter: give the task the PeftModel that has it"
    return f"checkpoint {name!r} does not fit the model: {'; '.join(parts)}; {fix}"
