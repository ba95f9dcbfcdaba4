"""Adam's state at a checkpoint: both moments of every parameter, by the model's own names."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor, nn

from dattri_core.batch import raw_bytes
from dattri_core.errors import InputError, NumericsError
from dattri_core.optimiser_files import names_of, read_optimiser, require_adam
from dattri_core.state_files import hash_of


@frozen(eq=False)
class ParameterMoments:
    """What Adam holds of one parameter after t steps.

    m = b1 m + (1 - b1) g and v = b2 v + (1 - b2) g^2 at each of them, from zeros on.

    Args:
        first: m, of the shape of the parameter.
        second: v, likewise.
        step: t, the number of steps taken so far.
        betas: (b1, b2).
        epsilon: Added to the root of the second moment.
    """

    first: Tensor
    second: Tensor
    step: int
    betas: tuple[float, float]
    epsilon: float


def _path(source: Any) -> Any:
    return Path(source) if isinstance(source, str) else source


def _names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)


@frozen(eq=False)
class AdamState:
    """The moments of Adam or AdamW at a checkpoint: those that its next step would start from.

    ``AdamState.of(optimizer, model)`` copies them from an optimiser at work;
    ``AdamState("checkpoint-500/optimizer.pt")`` reads them from its file when they are used: of
    ``torch.save(optimizer.state_dict(), path)`` or of the Trainer of Hugging Face. Source: Kingma
    and Ba 2015, Adam: A Method for Stochastic Optimization, algorithm 1 (arXiv 1412.6980).

    Args:
        source: A file, or moments by the model's names of parameters.
        names: Of a file, the names of the parameters in the order of the optimiser's groups, where
            shapes do not tell them.
    """

    source: Path | Mapping[str, ParameterMoments] = field(converter=_path, repr=False)
    names: tuple[str, ...] | None = field(default=None, converter=_names, repr=False)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.source, (Path, Mapping)):
            raise InputError(
                f"optimiser: got a {type(self.source).__name__}; give AdamState.of(optimizer, "
                "model), or the path of torch.save(optimizer.state_dict(), path)"
            )

    @staticmethod
    def of(optimizer: torch.optim.Optimizer, model: nn.Module) -> AdamState:
        """Return the moments that an optimiser holds now, copied; parameters match by identity.

        Args:
            optimizer: A ``torch.optim.Adam`` or ``AdamW``, as it is or wrapped by Accelerate.
            model: Whose parameters it optimises; a tied weight has the first of its names.

        Returns:
            The state of all parameters that it has updated.

        Raises:
            InputError: It is another optimiser than Adam or AdamW, or optimises another model.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
        label = "optimiser"
        if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            raise InputError(
                f"{label}: got a {type(optimizer).__name__}, expected a torch.optim.Adam or AdamW; "
                "use the source 'per-example' for other optimisers"
            )
        require_adam(label, list(optimizer.state.values()), optimizer.param_groups)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        moments: dict[str, ParameterMoments] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in names:
                    raise InputError(
                        f"{label}: it optimises a parameter of shape {tuple(parameter.shape)} that "
                        f"{type(model).__name__} does not have; give the model whose parameters it "
                        "was made with"
                    )
                state = optimizer.state.get(parameter)
                if state:
                    moments[names[id(parameter)]] = _moments(state, group, copied=True)
        return AdamState(moments)

    @property
    def fingerprint(self) -> str:
        """Return a hash of the file's bytes and the names, or of all numbers."""
        digest = hashlib.sha256(repr(self.names).encode())
        if isinstance(self.source, Path):
            digest.update(hash_of(self.source).encode())
            return digest.hexdigest()
        for name in sorted(self.source):
            own = self.source[name]
            digest.update(f"\x1f{name}{own.step}{own.betas}{own.epsilon}".encode())
            for tensor in (own.first, own.second):
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(raw_bytes(tensor))
        return digest.hexdigest()

    def check(self, model: nn.Module, updated: Sequence[str] = ()) -> None:
        """Compare names and shapes with the model's; the numbers of a file stay where they are.

        Args:
            model: The model.
            updated: Parameters that must have been updated, so that there are moments of them.

        Raises:
            InputError: A name or shape is not the model's, or a parameter has no moments.
            StoreError: The file is truncated, or no state of an optimiser.
        """
        self._by_name(model, updated)

    def load(self, model: nn.Module, updated: Sequence[str] = ()) -> dict[str, ParameterMoments]:
        """Return the moments by the model's names of parameters.

        Args:
            model: The model.
            updated: As in `check`.

        Returns:
            m, v, t, betas and epsilon of every parameter that has been updated, each moment of the
            shape of its parameter, on the device where it was.

        Raises:
            InputError, StoreError: As `check`.
            NumericsError: A moment is not finite, or a second one negative.
        """
        found = self._by_name(model, updated)
        for name in updated or found:
            own = found[name]
            for what, values, least in (
                ("first", own.first, -math.inf),
                ("second", own.second, 0.0),
            ):
                if not torch.isfinite(values).all() or bool((values < least).any()):
                    raise NumericsError(
                        f"{self._label}: the {what} moment of {name!r} is not finite or negative; "
                        "expected finite numbers, squares from 0 on; look for a run that diverged "
                        "before this checkpoint"
                    )
        return found

    @property
    def _label(self) -> str:
        where = f" {str(self.source)!r}" if isinstance(self.source, Path) else ""
        return f"optimiser{where}"

    def _by_name(self, model: nn.Module, updated: Sequence[str]) -> dict[str, ParameterMoments]:
        found = self._read(model) if isinstance(self.source, Path) else dict(self.source)
        own = dict(model.named_parameters())
        first = {id(parameter): name for name, parameter in own.items()}
        aliases = {
            name: first[id(parameter)]  # a tied weight has several names
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        unknown = sorted(set(found) - set(aliases))
        if unknown:
            raise InputError(
                f"{self._label}: it has moments of {unknown[:6]}, which {type(model).__name__} "
                "does not have; give the names of model.named_parameters(), and the state that "
                "belongs to this model"
            )
        named = {aliases[name]: moments for name, moments in found.items()}
        for name, moments in named.items():
            for tensor in (moments.first, moments.second):
                if tensor.shape != own[name].shape:
                    raise InputError(
                        f"{self._label}: the moments of {name!r} have shape {tuple(tensor.shape)}, "
                        f"the model's parameter {tuple(own[name].shape)}; give the state that "
                        "belongs to this model, or names= in the order of its groups"
                    )
        missing = [name for name in updated if name not in named or named[name].step < 1]
        if missing:
            raise InputError(
                f"{self._label}: it has no moments of {missing[:6]}, which were never updated; "
                f"leave them out with parameters='!{missing[0]}', or take a checkpoint after the "
                "first step"
            )
        return named

    def _read(self, model: nn.Module) -> dict[str, ParameterMoments]:
        assert isinstance(self.source, Path)
        held, groups = read_optimiser(self.source)
        require_adam(self._label, list(held.values()), groups)
        names = names_of(self._label, held, groups, model, self.names)
        return {
            names[number]: _moments(held[number], group)
            for group in groups
            for number in group["params"]
            if held.get(number)
        }


def _moments(
    state: Mapping[str, Any], group: Mapping[str, Any], *, copied: bool = False
) -> ParameterMoments:
    first, second = state["exp_avg"].detach(), state["exp_avg_sq"].detach()
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return ParameterMoments(
        first.clone() if copied else first,
        second.clone() if copied else second,
        int(state["step"]),
        (beta1, beta2),
        float(group["eps"]),
    )
