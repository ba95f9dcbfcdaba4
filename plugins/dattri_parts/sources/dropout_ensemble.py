"""An ensemble of thinned networks from one checkpoint: another source under fixed dropout masks."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

from attrs import evolve, field, frozen, validators
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from dattri_core import (
    BoundSource,
    Checkpoint,
    EnsembleSource,
    RandomStream,
    Source,
    SpecError,
    Task,
    sides_differ,
    source_needs,
)
from dattri_parts.sources.masks import ANY, CHANNELS, FEATURES, Mask
from dattri_parts.sources.per_example import PerExample

AXES: dict[type[nn.Module], int] = {
    nn.Dropout: FEATURES,
    nn.Dropout1d: CHANNELS,
    nn.Dropout2d: CHANNELS,
    nn.Dropout3d: CHANNELS,
}
"""Kind of dropout module -> the axis of its output that a mask acts on."""


@frozen
class DropoutEnsemble:
    """Rows of D thinned networks of every checkpoint, each with dropout masks that stay fixed.

    Member d multiplies the output of each dropout module by a mask, m_f = 0 with the module's
    probability p and 1 / (1 - p) otherwise, and its rows are the gradients of that network's loss.
    A mask acts on the features of ``nn.Dropout`` (the last axis) and on the channels of
    ``nn.Dropout1d``, ``2d`` and ``3d`` (the axis after the examples). It is the same for every
    example and position, and a function of (seed, member, module, feature) alone, so a row depends
    on no batch and no order, and curvature is that of the thinned network too.

    The fold sees D checkpoints in place of one, as the paper does: a mean over checkpoints is one
    over members, and what a fold averages apart is averaged apart. Members share the learning rate
    of their checkpoint.

    Dropout that is called as a function inside ``forward`` (``F.dropout``, the attention weights of
    ``nn.MultiheadAttention``) is no module, cannot be found, and stays off.

    Source: Deng et al. 2024, Efficient Ensembles Improve Training Data Attribution
    (arXiv 2405.17293); a thinned network is that of Srivastava et al. 2014, Dropout: A Simple Way
    to Prevent Neural Networks from Overfitting.

    Args:
        source: Gives the rows of each thinned network.
        members: D, the networks that are made of each checkpoint.
        modules: Patterns of the names of dropout modules; one that begins with ``!`` excludes.
            Default all.
        rate: p of all of them; None: each module's own.
        outputs: Patterns of the names of other modules whose outputs are masked as if a dropout
            module came behind them, such as activations, for a model that was trained without
            dropout; needs ``rate``. Outputs of four axes and more are masked by channels.
        seed: Of the masks.
    """

    source: Source = field(factory=PerExample)
    members: int = field(default=3, validator=validators.ge(1))
    modules: tuple[str, ...] = field(default=("*",), converter=tuple)
    rate: float | None = field(default=None)
    outputs: tuple[str, ...] = field(default=(), converter=tuple)
    seed: int = 0

    @source.validator
    def _single(self, _: object, value: Source) -> None:
        if isinstance(value, EnsembleSource):
            raise SpecError(
                "dropout-ensemble: source is an ensemble itself; give a source of one network, "
                "and as many members= as are wanted"
            )

    @modules.validator
    def _named(self, _: object, value: tuple[str, ...]) -> None:
        if not value:
            raise SpecError("dropout-ensemble: modules is empty; give patterns such as 'layers.*'")

    @rate.validator
    def _probability(self, _: object, value: float | None) -> None:
        if value is not None and not 0 <= value < 1:
            raise SpecError(
                f"dropout-ensemble: rate is {value}; give a probability of at least 0 and below 1, "
                "or None for that of each module"
            )

    @outputs.validator
    def _rated(self, _: object, value: tuple[str, ...]) -> None:
        if value and not self.rate:
            raise SpecError(
                f"dropout-ensemble: outputs={list(value)} names modules that have no probability "
                "of their own; give rate= above 0"
            )

    @property
    def provides(self) -> frozenset[str]:
        """Return what the inner source provides."""
        return self.source.provides

    @property
    def needs(self) -> frozenset[str]:
        """Return what the inner source asks of a checkpoint."""
        return source_needs(self.source)

    @property
    def sides_differ(self) -> bool:
        """Return whether train rows of the inner source are of another kind than its test rows."""
        return sides_differ(self.source)

    def bind(self, task: Task, checkpoint: Checkpoint, sample: object) -> BoundSource:
        """Bind the inner source to the thinned network ``checkpoint.member`` of a checkpoint.

        Raises:
            SpecError: No dropout module is found, or none that drops anything.
            InputError: As of the inner source.
        """
        stream = RandomStream(self.seed, "dropout")
        hooks = {
            path: Mask(path, stream.key(checkpoint.member, path), rate, axis)
            for path, rate, axis in self._dropped(task.model)
        }
        return self.source.bind(task, evolve(checkpoint, hooks=hooks), sample)

    def _dropped(self, model: nn.Module) -> Iterator[tuple[str, float, int]]:
        """Yield path, rate and axis of every module that is masked."""
        found = {
            path: module for path, module in model.named_modules() if isinstance(module, _DropoutNd)
        }
        others = [path for path, _ in model.named_modules() if path and path not in found]
        for path in self._chosen(others, self.outputs, "modules") if self.outputs else ():
            assert self.rate is not None
            yield path, self.rate, ANY
        if not found and self.outputs:
            return
        if not found:
            raise SpecError(
                f"dropout-ensemble: {type(model).__name__} has no dropout module (nn.Dropout, "
                "nn.Dropout1d, 2d or 3d) to mask; dropout called as a function (F.dropout) cannot "
                "be found: make it a module, name other modules whose outputs are masked (outputs="
                f"and rate=), or use the source {type(self.source).__name__} alone"
            )
        chosen = {path: found[path] for path in self._chosen(list(found), self.modules)}
        kinds = {path: _axis_of(module) for path, module in chosen.items()}
        unfit = [path for path, axis in kinds.items() if axis is None]
        if unfit:
            raise SpecError(
                f"dropout-ensemble: {type(chosen[unfit[0]]).__name__} at {unfit[0]!r} is no "
                f"product with a mask; leave it out with modules=['!{unfit[0]}']"
            )
        rates = {path: m.p if self.rate is None else self.rate for path, m in chosen.items()}
        if self.rate is None and not any(rates.values()):
            raise SpecError(
                f"dropout-ensemble: the dropout modules {sorted(chosen)} have p = 0 and drop "
                "nothing, so all members would be the same; give rate="
            )
        for path, axis in kinds.items():
            assert axis is not None
            yield path, rates[path], axis

    def _chosen(
        self, paths: list[str], patterns: tuple[str, ...], what: str = "dropout modules"
    ) -> list[str]:
        including = [p for p in patterns if not p.startswith("!")] or ["*"]
        excluding = [p.removeprefix("!") for p in patterns if p.startswith("!")]
        for pattern in (*including, *excluding):
            if not fnmatch.filter(paths, pattern):
                raise SpecError(
                    f"dropout-ensemble: the pattern {pattern!r} matches none of the {what} {paths}"
                )
        chosen = [
            path
            for path in paths
            if any(fnmatch.fnmatchcase(path, pattern) for pattern in including)
            and not any(fnmatch.fnmatchcase(path, pattern) for pattern in excluding)
        ]
        if not chosen:
            raise SpecError(
                f"dropout-ensemble: {list(patterns)} leaves none of the {what} {paths}; use the "
                f"source {type(self.source).__name__} alone"
            )
        return chosen


def _axis_of(module: nn.Module) -> int | None:
    """Return the axis that a kind of dropout acts on; None where it is more than a product."""
    return next((axis for kind, axis in AXES.items() if isinstance(module, kind)), None)
