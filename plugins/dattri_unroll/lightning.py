"""Recording a run of Lightning's Trainer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from dattri_core import InputError
from dattri_unroll.recorder import Recorder

Indices = Callable[[Any], "Tensor | Sequence[int]"]


def lightning_callback(
    folder: str | Path, indices: Indices, scale: Callable[[Any], float] | None = None
) -> Any:
    """Return a callback for ``lightning.Trainer(callbacks=[...])`` that records the run.

    The run must be one of a single device, of SGD, Adam or AdamW with automatic optimisation and
    one batch a step (``accumulate_grad_batches=1``); see `record`. Clipping to a norm is recorded.

    Args:
        folder: Of the run.
        indices: Gives the positions in the train set of the examples of a batch, ``[B]``; let the
            data set return the position beside each example.
        scale: Given a batch, what is minimised over the mean of the task's loss; None: 1, a mean
            over examples. See `Recorder.step`.

    Raises:
        InputError: Lightning is not installed, or, when the training begins, it steps otherwise.
    """
    lightning = _module()

    class RecordRun(lightning.Callback):  # type: ignore[misc, name-defined]
        """Records every optimiser step."""

        def __init__(self) -> None:
            super().__init__()
            self.recorder: Recorder | None = None
            self.batch: Any = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Begin, or go on with, the run."""
            plain: dict[str, Any] = {"accumulate_grad_batches": 1, "world_size": 1}
            if trainer.gradient_clip_val:
                plain["gradient_clip_algorithm"] = "norm"
            wrong = {
                name: getattr(trainer, name)
                for name, value in plain.items()
                if str(getattr(trainer, name) or value) not in (str(value), f"GradClip.{value}")
            }
            if wrong or len(trainer.optimizers) != 1:
                raise InputError(
                    f"record: the Lightning trainer has {len(trainer.optimizers)} optimisers and "
                    f"{wrong}; a recorded run has one optimiser, one device, one batch a step and "
                    "no clipping but that to a norm"
                )
            clip = trainer.gradient_clip_val or None
            self.recorder = Recorder(pl_module, trainer.optimizers[0], Path(folder), clip)

        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            """Keep the batch until its step."""
            self.batch = batch

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            """Write the step down."""
            assert self.recorder is not None
            over = 1.0 if scale is None else float(scale(self.batch))
            self.recorder.step(indices(self.batch), epoch=trainer.current_epoch, scale=over)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            """End the run."""
            assert self.recorder is not None
            self.recorder.finish()
            self.recorder.close()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            """Leave a run that can be gone on with."""
            if self.recorder is not None:
                self.recorder.close()

    return RecordRun()


def _module() -> Any:
    for name in ("lightning", "pytorch_lightning"):
        with suppress(ImportError):
            return importlib.import_module(name)
    raise InputError(
        "lightning_callback: Lightning is not installed; install it with: pip install lightning"
    )
