"""Gradients whose kernels a CUDA device has recorded: one launch in place of hundreds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Gradients = Callable[[Tensor], Tensor]
"""Set the gradients on the examples at some positions, ``[B]``, and return their mean loss."""
WARM_UP = 3
"""Batches before the recording: libraries choose their kernels and take their memory in these."""


class RecordedGradients:
    """Gradients as a function sets them, by kernels that are recorded once and then replayed.

    A small model's kernels are done before Python has asked for the next one. A recording (a CUDA
    graph) asks for all of them at once; they are the same, on the same addresses. So nothing but
    tensors may change from batch to batch: the function runs in Python for the recording alone.

    Batches of another size, and the first `WARM_UP`, are computed by the function. Where kernels
    cannot be recorded, as those that wait for the host, all are, and a warning says so.

    Args:
        compute: Sets new gradients; positions are on the device.
        parameters: Whose gradients it sets.
        size: Positions of a batch that is recorded.
    """

    def __init__(self, compute: Gradients, parameters: Sequence[Tensor], size: int) -> None:
        self._compute, self._parameters, self._size = compute, parameters, size
        self._device = parameters[0].device
        self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._seen = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._positions = torch.empty(0)
        self._loss = torch.empty(0)
        self._gradients: list[Tensor | None] = []

    def __call__(self, positions: Tensor) -> Tensor:
        """Set the gradients of a batch and return its mean loss; it is overwritten by the next."""
        if len(positions) != self._size:
            return self._compute(positions)
        if self._seen < WARM_UP:
            self._seen += 1
            return self._beside(positions)
        if self._graph is None:
            self._record(positions)
        if self._graph is None:
            return self._compute(positions)
        self._positions.copy_(positions)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient  # a batch of another size has set one of its own
        self._graph.replay()
        return self._loss

    def _beside(self, positions: Tensor) -> Tensor:
        """Compute on a stream of its own, as a recording does."""
        here = torch.cuda.current_stream(self._device)
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            loss = self._compute(positions)
        here.wait_stream(self._side)
        return loss

    def _record(self, positions: Tensor) -> None:
        self._positions = positions.clone()
        here, graph = torch.cuda.current_stream(self._device), torch.cuda.CUDAGraph()
        try:
            # A recording that fails leaves its stream as the current one.
            with torch.cuda.stream(here), torch.cuda.graph(graph, stream=self._side):
                self._loss = self._compute(self._positions)
        except RuntimeError as error:
            self._size = 0
            warnings.warn(
                f"training: a step cannot be recorded on the device ({error}); every step is run "
                "from Python, with recorded=False it is from the first",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._graph = graph
