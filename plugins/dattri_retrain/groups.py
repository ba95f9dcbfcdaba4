"""Groups of train examples, read from a file of labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from dattri_parts.training import leave_groups_out

from dattri_core import Counterfactual, InputError

Array = np.ndarray[Any, Any]
LABELS = "one label for each train example: whole numbers or texts, and null in JSON for none"


def plan_of_groups(path: Path, n: int, seed: int) -> list[Counterfactual]:
    """Return all examples, and all but those of each group, in the order of their first examples.

    Args:
        path: An ``.npy`` file of whole numbers, truth values or texts ``[n]``, or a ``.json`` file
            of a list of them. Examples with the same label are a group; JSON's ``null`` is none.
        n: Train examples.
        seed: Of the training, one for all.

    Raises:
        InputError: The file is no such one, or has one group alone.
    """
    labels = _labels(path)
    if len(labels) != n:
        raise InputError(
            f"retrain: --groups {str(path)!r} has {len(labels)} labels, and there are {n} train "
            f"examples; give {LABELS}"
        )
    groups: dict[str, list[int]] = {}
    for position, label in enumerate(labels):
        if label is not None:
            groups.setdefault(json.dumps(label), []).append(position)
    whole = Counterfactual(np.ones(n, np.bool_), seed)
    masks = [np.isin(np.arange(n), members) for members in groups.values()]
    return [whole, *leave_groups_out(n, masks, seed=seed)]


def _labels(path: Path) -> list[Any]:
    if path.suffix not in (".npy", ".json"):
        raise InputError(f"retrain: --groups {str(path)!r}; expected a file .npy or .json")
    try:
        if path.suffix == ".npy":
            labels = np.load(path, allow_pickle=False).tolist()
        else:
            labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"retrain: --groups {str(path)!r} cannot be read ({error})") from error
    known = (int, str, type(None))  # truth values are whole numbers
    if not isinstance(labels, list) or not all(isinstance(label, known) for label in labels):
        raise InputError(f"retrain: --groups {str(path)!r} holds something else than {LABELS}")
    return labels
