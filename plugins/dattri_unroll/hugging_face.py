"""Recording a run of the Hugging Face Trainer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dattri_core import InputError
from dattri_unroll.recorder import Recorder


def hugging_face_callback(
    folder: str | Path,
    column: str = "index",
    scale: Callable[[Mapping[str, Any]], float] | None = None,
) -> Any:
    """Return a callback for ``transformers.Trainer(callbacks=[...])`` that records the run.

    A callback of the Trainer does not see batches, so the data set says where its examples stand: a
    column of positions in the train set, which is taken out of the batch before the model is
    called (``TrainingArguments(remove_unused_columns=False)`` lets it come so far). The run must be
    one of AdamW, Adam or SGD on one device, one batch a step, as `record` says:
    ``TrainingArguments(optim="adamw_torch", gradient_accumulation_steps=1)``; its ``max_grad_norm``
    is recorded. No module may draw numbers: set the dropout of the model to 0.

    Args:
        folder: Of the run.
        column: Name of the column of positions.
        scale: Given the arguments of the model for a batch, what the Trainer minimises over the
            mean of the task's loss; None: 1, a mean over examples. See `Recorder.step`.

    Raises:
        InputError: transformers is not installed, or, when the training begins, it steps otherwise.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(
            "hugging_face_callback: transformers is not installed; install it with: "
            'pip install "dattri-core[hf]"'
        ) from error

    class RecordRun(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        """Records every optimiser step."""

        def __init__(self) -> None:
            super().__init__()
            self.recorder: Recorder | None = None
            self.positions: Any = None
            self.scale = 1.0
            self.hook: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """Begin, or go on with, the run."""
            plain = {"gradient_accumulation_steps": 1, "world_size": 1}
            wrong = {n: getattr(args, n) for n, v in plain.items() if getattr(args, n) != v}
            if wrong:
                raise InputError(
                    f"record: the training arguments are {wrong}; a recorded run has "
                    "gradient_accumulation_steps=1 and one device"
                )
            # Accelerate wraps the optimiser; the steps are taken by the one inside.
            optimizer = getattr(given["optimizer"], "optimizer", given["optimizer"])
            clip = args.max_grad_norm or None
            self.recorder = Recorder(given["model"], optimizer, Path(folder), clip)
            self.hook = given["model"].register_forward_pre_hook(self._catch, with_kwargs=True)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """Write the step down."""
            assert self.recorder is not None
            if self.positions is None:
                raise InputError(
                    f"record: the batches have no column {column!r} of positions in the train set; "
                    "add it to the data set, and set remove_unused_columns=False"
                )
            self.recorder.step(self.positions, epoch=int(state.epoch or 0), scale=self.scale)
            self.positions = None

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """End the run."""
            assert self.recorder is not None
            self.hook.remove()
            self.recorder.finish()
            self.recorder.close()

        def _catch(self, model: nn.Module, args: Any, named: dict[str, Any]) -> Any:
            named = dict(named)
            found = named.pop(column, None)
            if model.training and found is not None:
                self.positions = found.flatten()
                self.scale = 1.0 if scale is None else float(scale(named))
            return args, named

    return RecordRun()
