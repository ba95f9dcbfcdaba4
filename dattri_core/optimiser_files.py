"""Files of an optimiser's state: which of its numbers is which parameter of the model."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dattri_core.errors import InputError, StoreError

FOREIGN = {
    "exp_avg_sq_row": "Adafactor",
    "state1": "an optimiser of 8 bits",
    "momentum_buffer": "SGD",
    "square_avg": "RMSprop",
    "exp_inf": "Adamax",
    "mu_product": "NAdam",
}
"""What an optimiser keeps of a parameter -> which one it is, where it is not Adam."""
PLACES = 4096
"""Most ways to have named some of the parameters that are looked at before they are too many."""

Shape = tuple[int, ...]
Groups = Sequence[Mapping[str, Any]]


def read_optimiser(path: Path) -> tuple[dict[Any, dict[str, Any]], list[dict[str, Any]]]:
    """Return what a file holds of each number or name, and the groups; never a pickle of code.

    Numbers of large files stay on disk until they are used.

    Raises:
        InputError: There is no such file.
        StoreError: It is truncated, or no state dict of an optimiser.
    """
    if not path.is_file():
        raise InputError(f"optimiser: no file {str(path)!r}")
    try:
        found = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:
        said = str(error).partition("\n")[0].partition(". ")[0]
        raise StoreError(
            f"optimiser {str(path)!r}: cannot be read as tensors only ({type(error).__name__}: "
            f"{said}); a pickle is never loaded, since it may hold code: save "
            "torch.save(optimizer.state_dict(), path)"
        ) from error
    if not isinstance(found, dict) or not {"state", "param_groups"} <= set(found):
        raise StoreError(
            f"optimiser {str(path)!r}: holds a {type(found).__name__}, expected the 'state' and "
            "'param_groups' of torch.save(optimizer.state_dict(), path)"
        )
    return dict(found["state"]), list(found["param_groups"])


def require_adam(label: str, held: Sequence[Mapping[str, Any]], groups: Groups) -> None:
    """Raise `InputError` unless a state is that of Adam or AdamW as torch has them."""
    kept = {key for state in held for key in state}
    foreign = [optimiser for key, optimiser in FOREIGN.items() if key in kept]
    for group in groups:
        # RAdam keeps what Adam keeps; only Adam has a choice of AMSGrad.
        if foreign or not {"betas", "eps", "amsgrad"} <= set(group):
            raise InputError(
                f"{label}: it is the state of {foreign[0] if foreign else 'another optimiser'}, "
                "expected that of torch.optim.Adam or AdamW; rows that know the optimiser are made "
                "of Adam's moments: use the source 'per-example' for other optimisers"
            )
        for choice in ("amsgrad", "maximize"):
            if group.get(choice):
                raise InputError(
                    f"{label}: it has {choice}=True, which is another update; expected Adam or "
                    "AdamW without it; use the source 'per-example'"
                )


def names_of(
    label: str,
    held: Mapping[Any, Mapping[str, Any]],
    groups: Groups,
    model: nn.Module,
    given: Sequence[str] | None,
) -> dict[Any, str]:
    """Return the model's name of each of the numbers that an optimiser gives its parameters.

    An optimiser numbers parameters group after group, and a group holds them in the order of the
    model: so the Trainer of Hugging Face makes one of those with weight decay and one of those
    without. Which parameter is in which group is what the shapes leave open in one way alone. Of
    sharded training the whole state has names in place of numbers.

    Args:
        label: What messages call the state.
        held: What is kept of each number; ``"exp_avg"`` shows the shape.
        groups: ``param_groups`` of the state dict.
        model: Whose parameters they are.
        given: Their names in the order of the numbers, where the user says so.

    Returns:
        The name of every number, also of those of which nothing is kept.

    Raises:
        InputError: The names cannot be told, or do not fit.
    """
    numbers = [list(group["params"]) for group in groups]
    flat = [n for group in numbers for n in group]
    if flat and all(isinstance(n, str) for n in flat):
        return {n: n for n in flat}
    if given is None and all("param_names" in group for group in groups):
        given = [name for group in groups for name in group["param_names"]]
    if given is not None:
        if len(given) != len(flat):
            raise InputError(
                f"{label}: names= has {len(given)} names, and the optimiser numbers {len(flat)} "
                f"parameters in groups of {list(map(len, numbers))}; give one for each, group "
                "after group"
            )
        return dict(zip(flat, given, strict=True))
    shapes = {n: _shape(held[n]["exp_avg"]) if n in held else None for n in flat}
    pool = _pool(label, model, list(map(len, numbers)))
    ways = _ways([[shapes[n] for n in group] for group in numbers], list(pool.values()))
    if len(ways) != 1:
        what = "no way" if not ways else "several ways"
        raise InputError(
            f"{label}: its groups of {list(map(len, numbers))} parameters fit the shapes of the "
            f"model's in {what}, each group in the order of the model; expected one; give names=, "
            "the names of the parameters group after group: [name for group in "
            "optimizer.param_groups for parameter in group['params'] for name, own in "
            "model.named_parameters() if own is parameter]"
        )
    names: dict[Any, str] = {}
    taken = [0] * len(numbers)
    for name, group in zip(pool, ways[0], strict=True):
        names[numbers[group][taken[group]]] = name
        taken[group] += 1
    return names


def _pool(label: str, model: nn.Module, sizes: Sequence[int]) -> dict[str, Shape]:
    """Return the parameters that were given to the optimiser: all, or those that are trained."""
    every = {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}
    trained = {name: shape for name, (shape, trains) in every.items() if trains}
    if sum(sizes) == len(trained):
        return trained
    if sum(sizes) == len(every):
        return {name: shape for name, (shape, _) in every.items()}
    raise InputError(
        f"{label}: it numbers {sum(sizes)} parameters, the model has {len(every)}, of which "
        f"{len(trained)} are trained; set requires_grad as it was in training, or give names=, the "
        "names of the parameters group after group"
    )


def _ways(groups: Sequence[Sequence[Shape | None]], pool: Sequence[Shape]) -> list[list[int]]:
    """Return the group of each parameter in the ways that the shapes allow; no more than two.

    Parameters are gone through in order; each is the next one of some group. A number of which
    nothing is kept (None) may have any shape.
    """
    reached: dict[tuple[int, ...], list[list[int]]] = {(0,) * len(groups): [[]]}
    for shape in pool:
        further: dict[tuple[int, ...], list[list[int]]] = {}
        for taken, ways in reached.items():
            for at, group in enumerate(groups):
                if taken[at] < len(group) and group[taken[at]] in (None, shape):
                    place = (*taken[:at], taken[at] + 1, *taken[at + 1 :])
                    known = further.setdefault(place, [])
                    known.extend([*way, at] for way in ways)
                    del known[2:]  # two show that there is no single one
        if len(further) > PLACES:
            return [[], []]
        reached = further
    return next(iter(reached.values()), [])


def _shape(value: object) -> Shape | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None
