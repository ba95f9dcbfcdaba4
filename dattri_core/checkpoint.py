"""Checkpoints: states of one model, loaded one at a time and checked name by name."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from attrs import evolve, field, frozen
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dattri_core.batch import raw_bytes
from dattri_core.errors import InputError, StoreError

StateDict: TypeAlias = Mapping[str, Tensor]
CheckpointSource: TypeAlias = "str | Path | StateDict | Checkpoint | None"
ForwardHook: TypeAlias = Callable[[nn.Module, Any, Any], Any]
"""Module, arguments and output to another output, or None; as torch has it."""
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@frozen(eq=False)
class TrainingStep:
    """The step of gradient descent that was taken from a checkpoint.

    theta' = theta - eta d with d = (1/|B|) sum_{i in B} grad loss_i(theta) + weight_decay theta,
    eta the learning rate of the checkpoint and theta' the next one. With momentum it is theta' =
    theta - eta v', v' = momentum v + (1 - dampening) d, where the first step of a run has v' = d;
    with Nesterov's, theta' = theta - eta (d + momentum v').

    Args:
        batch: B, positions in the train set ``[B]``, an example as often as it was drawn; None: the
            whole train set. An empty batch is no step: the end of the run.
        weight_decay: As optimisers define it.
        epoch: Which pass over the train set the step belongs to.
        momentum: As `torch.optim.SGD` defines it, the same at all steps of a run.
        dampening: Likewise.
        nesterov: Likewise.
    """

    batch: Tensor | None
    weight_decay: float = 0.0
    epoch: int = 0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False


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

    def fingerprint(self, model: nn.Module) -> str:
        """Return a hash of the weights: of the file's bytes, or of names and numbers."""
        if isinstance(self.source, Path):
            digest = hashlib.sha256()
            with self.source.open("rb") as file:
                while piece := file.read(4 * 2**20):
                    digest.update(piece)
            return digest.hexdigest()
        return state_fingerprint(own_tensors(model) if self.source is None else self.source)

    def check(self, model: nn.Module) -> None:
        """Compare names and shapes with the model's, without loading the numbers where possible."""
        if self.source is None:
            return
        if isinstance(self.source, Path):
            shapes = _shapes(self.source)
        else:
            shapes = {name: tuple(tensor.shape) for name, tensor in self.source.items()}
        _check_keys(self.name, model, shapes)

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
        _check_keys(self.name, model, {key: tuple(value.shape) for key, value in found.items()})
        aliases = _aliases(model)
        loaded = {}
        for name, tensor in wanted.items():
            value = found[next(alias for alias in aliases[name] if alias in found)]
            loaded[name] = value.detach().to(device=tensor.device, dtype=tensor.dtype)
        return loaded


def checkpoints_of(
    source: CheckpointSource | Sequence[CheckpointSource],
    learning_rates: Sequence[float] | None,
) -> tuple[Checkpoint, ...]:
    """Return the checkpoints that a path, pattern, folder, state dict or list of them names."""
    named: list[tuple[str, Path | StateDict | None]] = []
    items: Sequence[Any] = source if _is_sequence(source) else [source]  # type: ignore[assignment]
    if items and all(isinstance(item, Checkpoint) for item in items):
        return _as_given(items, learning_rates)
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
    rates: Sequence[float | None] = learning_rates or [None] * len(named)
    return tuple(
        Checkpoint(name, position, len(named), rate, state)
        for position, ((name, state), rate) in enumerate(zip(named, rates, strict=True))
    )


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


def _first_sentence(error: Exception) -> str:
    """Return what torch says before its advice, which is to load the pickle all the same."""
    return str(error).partition("\n")[0].partition(". ")[0]


def read_state(path: Path) -> dict[str, Tensor]:
    """Read tensors from a safetensors file or a weights-only torch file; never a pickle of code."""
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"checkpoint: no file {str(path)!r}") from error
    except Exception as error:
        raise StoreError(
            f"checkpoint {str(path)!r}: cannot be read as tensors only "
            f"({type(error).__name__}: {_first_sentence(error)}); a pickled "
            "model is never loaded, since it may hold code: save its tensors with "
            "safetensors.torch.save_file(model.state_dict(), path)"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise StoreError(
            f"checkpoint {str(path)!r}: holds a {type(state).__name__}, expected names and tensors"
        )
    return state


def state_fingerprint(state: StateDict) -> str:
    """Return a hash of names, dtypes, shapes and numbers of a state."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
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
    path = Path(item)
    if path.is_dir():
        files = sorted((p for p in path.iterdir() if p.suffix in SUFFIXES), key=_natural)
    elif path.exists():
        files = [path]
    else:
        files = sorted(map(Path, glob.glob(str(item))), key=_natural)  # noqa: PTH207 - any root
    if not files:
        raise InputError(
            f"checkpoint: {str(item)!r} names no file with a suffix of {', '.join(SUFFIXES)}"
        )
    return [(file.name, file) for file in files]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a key that puts ``step-9`` before ``step-10``."""
    pieces = re.split(r"(\d+)", str(path))
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in pieces]


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return every name of each tensor: tied weights have several, and files may hold any one."""
    by_identity: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_identity.setdefault(id(tensor), []).append(name)
    return {name: by_identity.get(id(t), [name]) for name, t in own_tensors(model).items()}


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes in a file; of a safetensors file only the header is read."""
    if path.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in read_state(path).items()}
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StoreError(
            f"checkpoint {str(path)!r}: is no whole safetensors file ({error}); save it again"
        ) from error


def _check_keys(name: str, model: nn.Module, found: Mapping[str, tuple[int, ...]]) -> None:
    aliases = _aliases(model)
    wanted = own_tensors(model)
    missing = [key for key in wanted if not any(alias in found for alias in aliases[key])]
    unexpected = sorted(set(found) - set(model.state_dict(keep_vars=True)))
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"missing {missing}")
        if unexpected:
            parts.append(f"unexpected {unexpected}")
        raise InputError(
            f"checkpoint {name!r} does not fit the model: {'; '.join(parts)}; "
            "save the state dict of this very model, unwrapped"
        )
    for key, tensor in wanted.items():
        alias = next(alias for alias in aliases[key] if alias in found)
        if found[alias] != tuple(tensor.shape):
            raise InputError(
                f"checkpoint {name!r}: {alias!r} has shape {found[alias]}, "
                f"the model's has {tuple(tensor.shape)}"
            )
