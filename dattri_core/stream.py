"""Data sets as fixed-order streams of batches, whatever they are given as."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Literal, cast

import numpy as np
import torch
from attrs import define, field
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from dattri_core.batch import Batch, batch_size, digest, join, take, tensors_of
from dattri_core.errors import InputError

Kind = Literal["tensors", "items", "batches"]
FINGERPRINT_EXAMPLES = 64


@define(eq=False)
class Examples:
    """n examples in a fixed order, read in batches of any size; position i is always example i.

    Made by `Examples.of` from a Dataset, a list, a DataLoader in a fixed order, or tensors.
    """

    name: str
    n: int
    kind: Kind
    _data: Any
    _order: Sequence[int] | None = None
    _collate: Callable[[list[Any]], Batch] = default_collate
    _workers: int = 0
    reads: int = field(default=0, init=False)
    """Examples read so far: what passes over the data cost."""
    _seen: dict[int, str] = field(factory=dict, init=False)

    @staticmethod
    def of(data: Any, name: str) -> Examples:
        """Return the stream over ``data``.

        Args:
            data: A Dataset or list of examples, a DataLoader, or a tensor, tuple or dict of tensors
                whose first axis counts examples.
            name: How errors call it: "train", "test" or "reference".

        Raises:
            InputError: The data are empty, shuffled, or of changing length or content.
        """
        if isinstance(data, Examples):
            return data
        if isinstance(data, DataLoader):
            examples = _of_loader(data, name)
        elif _is_nest_of_tensors(data):
            examples = Examples(name, batch_size(data), "tensors", data)
        elif isinstance(data, IterableDataset):
            examples = _of_batches(DataLoader(data, batch_size=1), name)
        elif isinstance(data, Sized) and hasattr(data, "__getitem__") and not _is_keyed(data):
            examples = Examples(name, len(data), "items", data)
        else:
            raise InputError(
                f"{name} data: got a {type(data).__name__}; give a Dataset, a DataLoader in a "
                "fixed order, or a tensor, tuple or dict of tensors"
            )
        if examples.n == 0:
            raise InputError(f"{name} data: empty; at least one example is needed")
        examples._check_repeatable()
        return examples

    def __len__(self) -> int:
        return self.n

    @property
    def ids(self) -> Sequence[int]:
        """Return the position of each example in the data set it came from.

        Where a sampler names an example twice, its place in the stream stands for it instead.
        """
        if self._order is None or len(set(self._order)) < self.n:
            return range(self.n)
        return self._order

    def sample(self, count: int) -> Batch:
        """Return the first ``count`` examples, repeated when there are fewer."""
        first = next(iter(self.batches(min(count, self.n))))[1]
        have = batch_size(first)
        return first if have >= count else take(first, torch.arange(count) % have)

    def batches(
        self, size: int, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[Tensor, Batch]]:
        """Yield positions ``[B]`` and batches of at most ``size`` examples of ``start:stop``.

        Raises:
            InputError: The data gave another number of examples, or others, than before.
        """
        stop = self.n if stop is None else min(stop, self.n)
        if self.kind == "batches":
            self.reads += stop - start
            yield from self._rebatched(size, start, stop)
            return
        for first in range(start, stop, size):
            last = min(first + size, stop)
            self.reads += last - first
            yield torch.arange(first, last), self._read(first, last)

    def take(self, index: Tensor) -> Batch:
        """Return the examples at the given positions, in that order."""
        positions = [int(i) for i in index]
        self.reads += len(positions)
        if self.kind == "tensors":
            return take(self._data, index)
        if self.kind == "items":
            return self._collate([self._data[self._position(i)] for i in positions])
        kept: dict[int, Batch] = {}
        wanted = set(positions)
        for at, batch in self._rebatched(1, 0, self.n):
            if int(at) in wanted:
                kept[int(at)] = batch
        return join([kept[i] for i in positions])

    @property
    def fingerprint(self) -> str:
        """Return a hash of the length and of up to 64 evenly spaced examples (tensors: of all)."""
        state = hashlib.sha256(str(self.n).encode())
        if self.kind == "tensors":
            state.update(digest(self._data).encode())
        elif self.kind == "items":
            for at in np.linspace(0, self.n - 1, min(self.n, FINGERPRINT_EXAMPLES)).astype(int):
                state.update(digest(self._read(int(at), int(at) + 1)).encode())
        else:
            for start in sorted(self._seen):
                state.update(f"{start}{self._seen[start]}".encode())
        return state.hexdigest()

    # --- reading --------------------------------------------------------------------------------
    def _position(self, at: int) -> int:
        return at if self._order is None else int(self._order[at])

    def _read(self, first: int, last: int) -> Batch:
        if self.kind == "tensors":
            return take(self._data, slice(first, last))
        items = [self._data[self._position(at)] for at in range(first, last)]
        try:
            return self._collate(items)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.name} data: examples {first} to {last - 1} cannot be put into one batch "
                f"({str(error).splitlines()[0]}); give a DataLoader with a collate_fn that pads"
            ) from error

    def _rebatched(self, size: int, start: int, stop: int) -> Iterator[tuple[Tensor, Batch]]:
        """Cut the batches of a loader anew: batch boundaries must not show in any result."""
        held: list[Batch] = []
        have, at = 0, start
        for offset, batch in self._given():
            count = batch_size(batch)
            low, high = max(start - offset, 0), min(stop - offset, count)
            if low >= high:
                continue
            held.append(take(batch, slice(low, high)))
            have += high - low
            while have >= size:
                whole = join(held)
                yield torch.arange(at, at + size), take(whole, slice(0, size))
                held, have, at = [take(whole, slice(size, have))], have - size, at + size
            if offset + count >= stop and stop < self.n:
                break  # the last range reads on, so that a loader that grew is seen
        if have:
            yield torch.arange(at, at + have), join(held)

    def _given(self) -> Iterator[tuple[int, Batch]]:
        total = 0
        for batch in self._data:
            count, content = batch_size(batch), digest(batch)
            before = self._seen.setdefault(total, content)
            if before != content or total + count > self.n:
                raise InputError(
                    f"{self.name} data: the batch at example {total} differs from the one read "
                    "there before; a loader must give the same examples in the same order on every "
                    "pass: no shuffling, no random augmentation"
                )
            yield total, batch
            total += count
        if total != self.n:
            raise InputError(
                f"{self.name} data: gave {total} examples in this pass and {self.n} in the first; "
                "a loader must have the same length on every pass"
            )

    def _check_repeatable(self) -> None:
        if self.kind != "items":
            return
        tried = sorted({int(at) for at in np.linspace(0, self.n - 1, min(self.n, 8))})
        again = max(3, 24 // len(tried))  # a flip with even odds stays unseen once in 10 million
        for at in tried:
            first = digest(self._read(at, at + 1))
            if any(digest(self._read(at, at + 1)) != first for _ in range(again)):
                raise InputError(
                    f"{self.name} data: example {at} differs when it is read again; switch random "
                    "augmentation off: attribution needs the same example every time"
                )


def _is_nest_of_tensors(data: Any) -> bool:
    if isinstance(data, (Tensor, np.ndarray)):
        return True
    if isinstance(data, tuple):
        return bool(data) and all(_is_nest_of_tensors(value) for value in data)
    if isinstance(data, Mapping):
        return bool(tensors_of(data))
    return False


def _is_keyed(data: Any) -> bool:
    return isinstance(data, (str, bytes, Mapping))


def _of_loader(loader: DataLoader[Any], name: str) -> Examples:
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return _of_batches(loader, name)
    sampler = loader.batch_sampler
    inner = getattr(sampler, "sampler", sampler)
    random = isinstance(inner, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler))
    orders = [_flatten(sampler) for _ in range(2)]
    if random or orders[0] != orders[1]:
        raise InputError(
            f"{name} data: the loader shuffles ({type(inner).__name__}), so scores could not be "
            "told apart by position; use shuffle=False, or give the dataset itself"
        )
    order = orders[0]
    return Examples(
        name,
        len(order),
        "items",
        loader.dataset,
        None if order == list(range(len(cast("Any", loader.dataset)))) else order,
        loader.collate_fn,
    )


def _flatten(batches: Iterable[Iterable[int]]) -> list[int]:
    return [int(i) for batch in batches for i in batch]


def _of_batches(loader: Iterable[Batch], name: str) -> Examples:
    total, seen = 0, {}
    for batch in loader:
        seen[total] = digest(batch)
        total += batch_size(batch)
    examples = Examples(name, total, "batches", loader)
    examples._seen = seen
    if total:
        for _ in examples._given():  # a second pass, so that a shuffle shows before long work
            pass
    return examples
