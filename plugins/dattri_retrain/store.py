"""The counterfactual store: what models trained on other train sets give, trained once and kept."""

from __future__ import annotations

import concurrent.futures
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import field, frozen, validators

from dattri_core import Counterfactual, InputError, Retraining, SpecError, StoreError, bar, nearest
from dattri_retrain.facts import Facts, read_manifest, write_manifest
from dattri_retrain.index import Index
from dattri_retrain.shards import OutcomeRows, discard_stale
from dattri_retrain.work import Group, Job, train_groups

Array = np.ndarray[Any, Any]
Part = tuple[int, int]


@frozen(eq=False)
class CounterfactualStore:
    """Outcomes of models trained on other train sets; those that are missing are trained.

    A row is a mask, a seed, and the outcome of every target on every test example. Rows lie under
    ``folder/<fingerprint of the retraining>``: a changed recipe, data set or model is a miss and
    the same one a hit, and one folder serves many. Every file appears whole, so a run may be
    killed at any time; run again, it trains what is missing and ends with the same rows. Several
    processes may fill one store at once.

    Args:
        folder: Of the store; made when it does not exist.
        retraining: How a model comes from a train set, and what is measured of it.
        every: Seconds of training that a killed process loses at most, besides what it had begun.

    Raises:
        InputError: ``retraining`` is none, or its fingerprint cannot name a folder.
        StoreError: The folder holds something else, or rows of data of another size.
    """

    folder: Path = field(converter=Path)
    retraining: Retraining = field()
    every: float = field(default=10.0, validator=validators.ge(0))
    _facts: Facts = field(init=False, repr=False)
    _index: Index = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        facts = Facts.of(self.retraining)
        object.__setattr__(self, "_facts", facts)
        object.__setattr__(self, "_index", Index(self.path, facts))
        self._require_own_manifest()

    @property
    def path(self) -> Path:
        """Return the folder of this retraining's rows."""
        return self.folder / self._facts.fingerprint

    def __len__(self) -> int:
        self._index.refresh()
        return len(self._index)

    # --- asking -------------------------------------------------------------------------------
    def outcomes(self, counterfactuals: Sequence[Counterfactual], target: str) -> Array:
        """Return what these models give, ``[len(counterfactuals), n_test]``; see `fill`.

        Args:
            counterfactuals: The train sets; those that are not there are trained.
            target: One of ``retraining.targets``.

        Raises:
            SpecError: The retraining does not measure the target.
        """
        if target not in self._facts.targets:
            raise SpecError(
                f"counterfactual store: no target {target!r} is measured; "
                f"{nearest(str(target), self._facts.targets)}"
            )
        if self.missing(counterfactuals):
            self.fill(counterfactuals)
        return self._index.values([c.key for c in counterfactuals], target)

    def missing(self, counterfactuals: Sequence[Counterfactual]) -> list[Counterfactual]:
        """Return those that have no row, each once, in their order.

        Raises:
            InputError: A mask is not of the train set's length.
            StoreError: A shard is truncated, damaged or foreign.
        """
        self._check(counterfactuals)
        self._index.refresh()
        unique = {c.key: c for c in counterfactuals}
        return [c for key, c in unique.items() if key not in self._index]

    def rows(self) -> OutcomeRows:
        """Return all rows, by seed and mask, whoever wrote them and in whichever order."""
        self._index.refresh()
        keys = self._index.keys
        n = self._facts.n_train
        packed = np.frombuffer(b"".join(key[4:] for key in keys), np.uint8)
        packed = packed.reshape(len(keys), -(-n // 8))
        return OutcomeRows(
            np.unpackbits(packed, axis=1, count=n, bitorder="little").astype(np.bool_),
            np.array([int.from_bytes(key[:4], "little") for key in keys], np.int64),
            {target: self._index.values(keys, target) for target in self._facts.targets},
        )

    # --- training -----------------------------------------------------------------------------
    def fill(
        self,
        counterfactuals: Sequence[Counterfactual],
        executor: concurrent.futures.Executor | None = None,
        index: Part | None = None,
        *,
        jobs: int = 64,
        progress: bool | None = None,
    ) -> int:
        """Train what is missing and return how many models were trained.

        The list is cut into groups of ``retraining.together``, always in the same way, so that a
        run that is resumed trains what the first would have trained together.

        Args:
            counterfactuals: The train sets.
            executor: Where to train: any `concurrent.futures.Executor`, or one of
                `joblib_executor`, `dask_executor` and `submitit_executor`. Jobs write into the
                folder themselves, so their machines must see it. None: here.
            index: ``(7, 50)``: train the 7th of 50 parts of the list, counted from 1; every
                machine takes another one.
            jobs: Into how many jobs the work is cut for an executor, at most.
            progress: Show a bar; by default only on a terminal.

        Raises:
            InputError: A mask of another length, a part that is none, or a retraining that cannot
                go to another process.
            NumericsError: A training diverged. The rows of all others are kept.
            StoreError: A shard is truncated, damaged or foreign; or what jobs wrote is not here.
        """
        groups = self._missing_groups(counterfactuals, index)
        total = sum(map(len, groups))
        if not groups:
            return 0
        write_manifest(self.path, self._facts)
        discard_stale(self.path)
        before = len(self._index)
        with bar("retrain", total, progress) as shown:
            if executor is None:
                self._train_here(groups, shown.advance)
            else:
                self._submit(groups, executor, jobs, shown.advance)
        self._index.refresh()
        return len(self._index) - before

    def _missing_groups(
        self, counterfactuals: Sequence[Counterfactual], index: Part | None
    ) -> list[Group]:
        """Return what is to be trained together; groups do not depend on what is there."""
        part, parts = (1, 1) if index is None else _checked_part(index)
        missing = {c.key for c in self.missing(counterfactuals)}
        unique = list({c.key: c for c in counterfactuals}.values())
        size = max(1, self.retraining.together)
        groups = [tuple(unique[i : i + size]) for i in range(0, len(unique), size)]
        mine = (tuple(c for c in g if c.key in missing) for g in groups[part - 1 :: parts])
        return [group for group in mine if group]

    def _train_here(self, groups: Sequence[Group], advance: Any) -> None:
        def known(group: Group) -> Group:
            self._index.refresh()  # another process may have trained some of it since
            return tuple(c for c in group if c.key not in self._index)

        train_groups(self.retraining, self._facts, self.path, groups, self.every, advance, known)

    def _submit(
        self,
        groups: Sequence[Group],
        executor: concurrent.futures.Executor,
        jobs: int,
        advance: Any,
    ) -> None:
        if jobs < 1:
            raise InputError(f"retrain: jobs is {jobs}, expected at least 1")
        if isinstance(executor, concurrent.futures.ProcessPoolExecutor):
            _require_picklable(self.retraining)
        cuts = [tuple(groups[start::jobs]) for start in range(min(jobs, len(groups)))]
        futures = {}
        errors = []
        try:
            for cut in cuts:
                job = Job(self.retraining, self._facts, self.path, cut, self.every)
                futures[executor.submit(job)] = sum(map(len, cut))
            for future in concurrent.futures.as_completed(futures):
                try:
                    names = future.result()
                except Exception as error:  # the other jobs go on: their rows are not lost
                    errors.append(error)
                    continue
                self._require_here(names)
                advance(futures[future])
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        if errors:
            raise errors[0]

    def _require_here(self, names: Sequence[str]) -> None:
        absent = [name for name in names if not (self.path / name).is_file()]
        if absent:
            raise StoreError(
                f"retrain: a job wrote {len(absent)} shards, such as {absent[0]!r}, and they are "
                f"not in {str(self.path)!r}; the folder must be one that every machine sees under "
                "this name. Shards from elsewhere may be copied into it"
            )

    def _require_own_manifest(self) -> None:
        theirs = read_manifest(self.path)
        if theirs is not None:
            self._facts.require(theirs, f"the folder {str(self.path)!r}")

    def _check(self, counterfactuals: Sequence[Counterfactual]) -> None:
        for position, counterfactual in enumerate(counterfactuals):
            if len(counterfactual.mask) != self._facts.n_train:
                raise InputError(
                    f"counterfactual store: the mask of counterfactual {position} has "
                    f"{len(counterfactual.mask)} entries, and there are {self._facts.n_train} "
                    "train examples"
                )


def _checked_part(index: Part) -> Part:
    part, parts = index
    if not 1 <= part <= parts:
        raise InputError(
            f"retrain: part {part} of {parts} does not exist; parts count from 1 to {parts}"
        )
    return part, parts


def _require_picklable(retraining: Retraining) -> None:
    try:
        pickle.dumps(retraining)
    except Exception as error:
        raise InputError(
            f"retrain: the {type(retraining).__name__} cannot go to another process "
            f"({type(error).__name__}: {error}); give the store a SettingRetraining(setting, "
            "size, seed), which is made again there, or classes and functions of an importable "
            "module instead of lambdas and closures"
        ) from error
