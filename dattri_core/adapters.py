"""Weights of an adapter (LoRA of PEFT): by which of the model's names they go.

A file of an adapter names its tensors without the adapter's own name: ``q_proj.lora_A.weight`` for
the model's ``q_proj.lora_A.default.weight``, and ``score.weight`` for a module that was trained as
a whole, ``score.modules_to_save.default.weight``. The base model is not in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dattri_core.errors import InputError

CONFIG = "adapter_config.json"
SAME = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""What decides, besides the tensors, what an adapter computes."""
SAVED = "modules_to_save"
MAGNITUDE = "lora_magnitude_vector"


def adapter_names(model: nn.Module, own: Iterable[str]) -> dict[str, str]:
    """Return, by its name in a file, the model's name of each tensor of its active adapter.

    Source: `peft.get_peft_model_state_dict`.
    """
    active = getattr(model, "active_adapter", None)
    if not isinstance(getattr(model, "peft_config", None), Mapping) or not isinstance(active, str):
        return {}
    prefix = getattr(getattr(model, "base_model", None), "prefix", "lora_")
    names: dict[str, str] = {}
    for name in own:
        parts = name.split(".")
        for at in range(1, len(parts)):
            before = parts[at - 1]
            if parts[at] != active or not (before.startswith(prefix) or before == SAVED):
                continue
            start = parts[: at - 1] if before == SAVED else parts[:at]
            end = [] if before == MAGNITUDE else parts[at + 1 :]
            names[".".join([*start, *end])] = name
            break
    return names


def is_adapter(found: Iterable[str], names: Mapping[str, str], own: Iterable[str]) -> bool:
    """Return whether a state is that of an adapter alone: it has a tensor by a name of a file."""
    return any(key in names for key in set(found) - set(own))


def require_same_adapter(model: nn.Module, folder: Path) -> None:
    """Raise unless the settings beside an adapter's file are those of the model's adapter.

    Raises:
        InputError: They differ, so that the same tensors would compute something else.
    """
    path = folder / CONFIG
    if not path.is_file():
        return
    try:
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"checkpoint: {str(path)!r} is not JSON ({error})") from error
    configs: Any = model.peft_config
    own = configs[model.active_adapter]
    changed = [
        f"{name} is {saved[name]!r} there, {getattr(own, name)!r} in the model"
        for name in SAME
        if name in saved and hasattr(own, name) and getattr(own, name) != saved[name]
    ]
    if changed:
        raise InputError(
            f"checkpoint {str(folder)!r}: its adapter is not that of the model: "
            f"{'; '.join(changed)}; give peft.PeftModel.from_pretrained(base, folder)"
        )
