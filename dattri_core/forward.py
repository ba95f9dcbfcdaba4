"""The outputs of a model on a batch, as shipped losses take them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dattri_core.batch import Batch
from dattri_core.errors import InputError
from dattri_core.losses import LABEL_KEYS, labels_of, unlabelled


def forward_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's outputs on a batch: everything but the labels is passed on.

    A mapping is passed by keyword, a tuple by position; of a structured answer ``.logits`` is
    taken, else its first item. A Hugging Face model is told to keep no keys and values of its
    attention for a next token, and where it has a decoder, that is given the labels before each
    (``decoder_input_ids``), unless the batch says otherwise.
    """
    if isinstance(batch, Mapping):
        given = {key: value for key, value in batch.items() if key not in LABEL_KEYS}
        answer = _by_keyword(model, {**_beside(model, batch), **given})
    elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
        answer = model(*batch[:-1])
    else:
        raise unlabelled(batch)
    return _tensor_of(answer)


def _beside(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a Hugging Face model is given beside the batch."""
    unwrap: Any = getattr(model, "get_base_model", None)  # of PEFT
    inner: Any = model if unwrap is None else unwrap()
    found: dict[str, Any] = {}
    if hasattr(inner, "config") and "use_cache" in inspect.signature(inner.forward).parameters:
        found["use_cache"] = False
    shift: Any = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(batch):
        found["decoder_input_ids"] = shift(labels=labels_of(batch))
    return found


def _by_keyword(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    try:
        return model(**inputs)
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise InputError(
            f"model: a batch that is a dict is passed by keyword, all but "
            f"{' and '.join(LABEL_KEYS)}, and {error}; name the keys after the arguments of "
            "forward, and the labels 'labels', or give a loss that calls the model itself: "
            "dattri.Loss(forward=..., criterion=...)"
        ) from error


def _tensor_of(answer: Any) -> Tensor:
    if isinstance(answer, Tensor):
        return answer
    if hasattr(answer, "logits"):
        return _tensor_of(answer.logits)
    if isinstance(answer, Mapping) and "logits" in answer:
        return _tensor_of(answer["logits"])
    if isinstance(answer, (tuple, list)) and answer:
        return _tensor_of(answer[0])
    raise InputError(f"model output: a {type(answer).__name__} is neither a tensor nor has .logits")
