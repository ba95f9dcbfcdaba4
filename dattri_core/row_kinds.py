"""The kinds of train rows: of the loss, of labels drawn from the model, and of the GGN's factor.

All are rows of one example's outputs pulled back to the parameters, r = J_b^T u, with another u:

- ``"loss"``: the slope of the criterion; the mean of r r^T is the empirical Fisher.
- ``"fisher"``: that slope at a label drawn from the model; its expected r r^T is the Fisher
  information, which is the GGN for a criterion that is a negative log likelihood.
- ``"ggn"``: each column f_k of a factor of the criterion's Hessian C_b = sum_k f_k f_k^T; then
  1/n sum r r^T over all rows of all examples is the GGN exactly.
- ``"leading"``: one eigenvector of C_b at a time, times the root of its eigenvalue; the first of
  each example make the GGN with the best approximation of rank one in place of every C_b.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from attrs import frozen
from torch import Tensor

from dattri_core.batch import Batch, batch_size, take
from dattri_core.criteria import LARGEST_HESSIAN
from dattri_core.errors import InputError, MemoryBudgetError, SpecError, format_bytes
from dattri_core.evaluate import Evaluator
from dattri_core.losses import Draw, Loss
from dattri_core.protocols import BoundSource, RandomStream, Role, RowKind, Sink
from dattri_core.source_capabilities import OutputSource
from dattri_core.task import Task

KINDS: tuple[RowKind, ...] = ("loss", "fisher", "ggn", "leading")
KIND_OF_NEED: dict[str, RowKind] = {
    "fisher-rows": "fisher",
    "ggn-rows": "ggn",
    "leading-rows": "leading",
}
"""The kind of rows that a word of `Curvature.needs` asks for, where it asks more than the loss."""
FACTOR_BYTES = 8  # of one number of a factor: it may be made in float64


def require_kind(kind: RowKind, task: Task) -> None:
    """Raise `SpecError` when the loss of a task cannot give a kind of rows; says what would."""
    if kind not in KINDS:
        raise SpecError(f"rows: no kind {kind!r}; expected one of {list(KINDS)}")
    loss, name = task.loss, task.loss_name
    if kind == "loss":
        return
    if not isinstance(loss, Loss):
        raise SpecError(
            f"rows of kind {kind!r}: they need the model's outputs and the criterion apart, and "
            f"the loss {name!r} gives neither; give dattri.Loss(forward=..., criterion=...) or a "
            "shipped loss by name, or use a curvature of the rows of the loss (the empirical "
            "Fisher) or of its Hessian"
        )
    if kind == "fisher" and loss.sample is None:
        raise SpecError(
            f"rows of kind 'fisher': the loss {name!r} does not say how a label is drawn from the "
            "model; give dattri.Loss(..., sample=lambda outputs, batch, draw: slope of the "
            "criterion at a drawn label), a shipped loss by name, or use rows of kind 'ggn' or a "
            "curvature of GGN products"
        )


def require_outputs(kind: RowKind, source: BoundSource) -> OutputSource:
    """Return a source that pulls back any u; raise `SpecError` where it gives loss rows only."""
    if isinstance(source, OutputSource):
        return source
    raise SpecError(
        f"rows of kind {kind!r}: the source {type(source).__name__} gives rows of the loss only; "
        "use the source 'per-example' or 'functional' (any with pull(batch, cotangent, sink)), or "
        "a curvature of the rows of the loss"
    )


@frozen(eq=False)
class RowReader:
    """One kind of rows of one source.

    Args:
        source: At a checkpoint.
        evaluator: Of that checkpoint.
        kind: Of the rows.
        draw: Which draw of labels; other draws are independent. Of kind ``"leading"`` the
            eigenvector, 0 that of the largest eigenvalue.
        random: Keys of random numbers.
        memory: Bytes of the fit; an eighth of it for the columns of a factor.
        role: Of the rows of kind ``"loss"``.
    """

    source: BoundSource
    evaluator: Evaluator
    kind: RowKind
    draw: int
    random: RandomStream
    memory: int
    role: Role = "train"

    def __attrs_post_init__(self) -> None:
        require_kind(self.kind, self.evaluator.task)
        if self.kind != "loss":
            require_outputs(self.kind, self.source)

    def examples(self, batch: int, sample: Batch) -> int:
        """Return how many examples to read at once for at most ``batch`` rows at a time.

        Args:
            batch: Rows at a time.
            sample: One example, on the device.

        Raises:
            InputError: The first axis of the outputs does not count examples, where a factor of the
                criterion's Hessian in them is asked for.
            MemoryBudgetError: The factor of one example is more than the budget.
        """
        if self.kind not in ("ggn", "leading"):
            return batch
        outputs = self._outputs(sample)
        self._require_by_example(outputs, sample)
        size = outputs[0].numel()
        if self.kind == "leading" and size > LARGEST_HESSIAN:
            raise SpecError(
                f"rows of kind 'leading': an example has {size} outputs, and eigenvectors of the "
                f"criterion's Hessian are computed up to {LARGEST_HESSIAN}; use a curvature of "
                "drawn labels ('fisher')"
            )
        each = size * size * FACTOR_BYTES
        if each > self.memory:
            raise MemoryBudgetError(
                f"rows of kind 'ggn': an example has {size} outputs, so its columns take "
                f"{format_bytes(each)} of a budget of {format_bytes(self.memory)}; use a curvature "
                "of GGN products or of drawn labels ('fisher' rows), or a larger memory="
            )
        return max(1, min(batch, self.memory // 8 // each))

    def parts(self, index: Tensor, batch: Batch, most: int) -> Iterator[tuple[Tensor, Batch]]:
        """Yield positions and a nest for `stream`, of at most ``most`` rows each.

        Args:
            index: Positions of the examples, ``[B]``.
            batch: Examples on the device, as many as `examples` says.
            most: Rows at a time.
        """
        if self.kind != "ggn":
            yield index, (batch,)
            return
        with torch.inference_mode(False):
            factor = self._factor(self._outputs(batch), batch)
        # Example by example, its own columns only: which rows come does not depend on the batch.
        there = _flat(factor).ne(0).any(-1).T.nonzero()  # pairs (example, column)
        if not len(there):  # `split` of nothing is one part of no examples, which no model takes
            return
        for pairs in torch.split(there, most):
            example, column = pairs.unbind(1)
            yield index[example.cpu()], (take(batch, example), factor[column, example])

    def stream(self, index: Tensor, nest: Batch, sink: Sink) -> dict[str, Tensor]:
        """Hand the blocks of one of `parts`, or of a part of it, to the sink."""
        batch = nest[0]
        if self.kind == "loss":
            return dict(self.source.stream(batch, self.role, sink))
        source = require_outputs(self.kind, self.source)
        if self.kind == "ggn":
            source.pull(batch, lambda _: nest[1], sink)
            return {}
        if self.kind == "leading":
            source.pull(batch, lambda outputs: self._leading(outputs, batch), sink)
            return {}

        def slope(outputs: Tensor) -> Tensor:
            return self.evaluator.sampled_slope(outputs, batch, self._uniforms(index, outputs))

        source.pull(batch, slope, sink)
        return {}

    def _leading(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return root(lambda) v of an eigenpair of every C_b, zeros where there is none."""
        factor = self._factor(outputs.detach(), batch)  # [K, B, ...]
        if self.draw >= len(factor):
            return torch.zeros_like(outputs)
        columns = _flat(factor).transpose(0, 1).double()  # [B, K, outputs]
        # F^T F = C, and w of F F^T is v of C: F^T w = root(lambda) v.
        _, weights = torch.linalg.eigh(columns @ columns.mT)
        chosen = weights[:, :, -1 - self.draw].unsqueeze(1)  # eigenvalues ascend
        leading: Tensor = (chosen @ columns).reshape(outputs.shape)
        return leading.to(outputs.dtype)

    def _factor(self, outputs: Tensor, batch: Batch) -> Tensor:
        self._require_by_example(outputs, batch)
        return self.evaluator.output_factor(outputs, batch)

    def _require_by_example(self, outputs: Tensor, batch: Batch) -> None:
        """Raise `InputError` unless the first axis of outputs counts the examples."""
        count = batch_size(batch)
        if outputs.dim() and len(outputs) == count:
            return
        raise InputError(
            f"rows of kind {self.kind!r}: the forward pass of the loss "
            f"{self.evaluator.task.loss_name!r} returned shape {tuple(outputs.shape)} for {count} "
            f"examples; expected [{count}, ...], examples first and on an axis of their own; give "
            "dattri.Loss(forward=...) outputs.transpose(0, 1) where time comes first, no "
            "flatten(0, 1), which the criterion may do, and squeeze(-1) in place of squeeze(); or "
            "use a curvature of GGN products (the solver 'cg')"
        )

    def _uniforms(self, index: Tensor, outputs: Tensor) -> Draw:
        """Return uniform numbers keyed by the position of each example, never by its batch."""
        keys = [("fisher", at, self.draw) for at in index.tolist()]
        shapes: list[tuple[int, ...]] = []

        def draw(*shape: int) -> Tensor:
            shapes.append(shape)  # other numbers at each call: those after the ones before
            return uniform(self.random, keys, shapes)[-1].to(outputs.device)

        return draw

    def _outputs(self, batch: Batch) -> Tensor:
        with self.evaluator.session(), torch.no_grad():
            return self.evaluator.outputs(None, batch)


def _flat(factor: Tensor) -> Tensor:
    """Return columns ``[K, B, outputs]`` of ``[K, B, ...]``; of outputs ``[B]`` there is one."""
    return factor.reshape(*factor.shape[:2], math.prod(factor.shape[2:]))


def uniform(
    stream: RandomStream, keys: Iterable[Sequence[object]], shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Return float64 numbers in [0, 1) from many generators, ``[keys, *shape]`` of each shape.

    The same as from ``stream.generator(*key)``, drawn from each for one shape after the other.

    Args:
        stream: Of the generators.
        keys: The further names of each.
        shapes: Of what is drawn from each.
    """
    seeds = [stream.key(*parts) for parts in keys]
    drawn = [torch.empty(len(seeds), *shape, dtype=torch.float64) for shape in shapes]
    shared = torch.Generator()  # to make one for each of many keys is most of the time
    for seed, *rows in zip(seeds, *(numbers.unbind() for numbers in drawn), strict=True):
        shared.manual_seed(seed)
        for row in rows:
            row.uniform_(generator=shared)
    return drawn
