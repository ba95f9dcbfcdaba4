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
from dattri_core.contents import content_of, piece_of, tensors_behind
from dattri_core.errors import DattriError, InputError

Kind = Literal["tensors", "items", "batches"]
FINGERPRINT_EXAMPLES = 64
CANDIDATES = 8
"""Evenly spaced examples of which a sample takes those that differ from one another."""


@define(eq=False)
class Examples:
    """n examples in a fixed order, read in batches of any size; position i is always example i.

    Made by `Examples.of` from a Dataset, a list, a DataLoader in a fixed order, or tensors.
    """

    name: str
    n: int
    kind: Kind
    _data: Any = field(repr=False)
    _order: Sequence[int] | None = None
    _collate: Callable[[list[Any]], Batch] = default_collate
    _origin: Examples | None = None
    reads: int = field(default=0, init=False)
    """Examples read so far: what passes over the data cost."""
    _seen: dict[int, str] = field(factory=dict, init=False)
    _content: str | None = field(default=None, init=False)

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
            _require_even(data, name)
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
        """Return a few examples, see `sampled`."""
        return self.sampled(count)[1]

    def sampled(self, count: int) -> tuple[Tensor, Batch]:
        """Return positions ``[count]`` of examples spread over the data, and these examples.

        The first example is the first; then come others that differ from all before them, so far
        as some of `CANDIDATES` evenly spaced ones do, and what is left. They are repeated when
        there are fewer. Of batches that can only be read in turn they are the first ones.
        """
        many = 1 if count == 1 else max(count, CANDIDATES)
        if self.kind == "batches" or many == 1:
            found, batch = next(iter(self.batches(min(many, self.n))))
        else:
            found = _spread(self.n, many)
            self.reads += len(found)
            batch = self._gather(found)
        order = torch.tensor(_unlike_first(batch, len(found)))
        order = order[torch.arange(count) % len(found)]
        return found[order], take(batch, order)

    def alone(self, position: int) -> Batch:
        """Return one example as a batch of its own: not padded to the length of others."""
        return self._gather(torch.tensor([position]))

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
            return self._collated(positions)
        kept: dict[int, Batch] = {}
        wanted = set(positions)
        for at, batch in self._rebatched(1, 0, self.n):
            if int(at) in wanted:
                kept[int(at)] = batch
        return join([kept[i] for i in positions])

    @property
    def examples(self) -> Examples:
        """Return these examples, or those whose positions they are."""
        return self if self._origin is None else self._origin

    def positions(self) -> Examples:
        """Return the positions of the examples in place of their data, with the same ids."""
        order = None if self.ids == range(self.n) else self.ids
        return Examples(self.name, self.n, "tensors", torch.arange(self.n), order, origin=self)

    @property
    def fingerprint(self) -> str:
        """Return a hash that costs no pass over the data.

        Of tensors, a `TensorDataset` and a stream it is that of all examples. Of any other data set
        it is that of the length and up to 64 evenly spaced examples, and begins with ``sampled-``
        where there are more: see `content`.
        """
        state = hashlib.sha256(str(self.n).encode())
        if self.kind == "batches":
            for start in sorted(self._seen):
                state.update(f"{start}{self._seen[start]}".encode())
            return state.hexdigest()
        tensors = self._tensors
        if tensors is not None:
            state.update(content_of(tensors).encode())
            if self._order is not None and self.kind == "items":
                state.update(str(list(self._order)).encode())
            return state.hexdigest()
        for at in np.linspace(0, self.n - 1, min(self.n, FINGERPRINT_EXAMPLES)).astype(int):
            state.update(content_of(self._read(int(at), int(at) + 1)).encode())
        return f"{'sampled-' if self.n > FINGERPRINT_EXAMPLES else ''}{state.hexdigest()}"

    @property
    def known_whole(self) -> bool:
        """Return whether `fingerprint` is a hash of all examples."""
        return self.kind == "batches" or self._tensors is not None

    @property
    def content(self) -> str:
        """Return a hash of all examples: of a data set by one pass over it, which is made once."""
        if self._origin is not None:
            return self._origin.content
        if self.known_whole:
            return self.fingerprint
        if self._content is None:
            state = hashlib.sha256(str(self.n).encode())
            size = piece_of(self._read(0, 1))
            for start in range(0, self.n, size):
                for said in self._contents(start, min(start + size, self.n)):
                    state.update(said.encode())
            self._content = state.hexdigest()
            self.reads += self.n
        return self._content

    def _contents(self, first: int, last: int) -> list[str]:
        """Return the hash of some examples in one batch, or of each where they make none."""
        items = self._items(range(first, last))
        try:
            return [content_of(self._batch(items, range(first, last)))]
        except InputError:
            return [
                content_of(self._batch([item], [at])) for at, item in enumerate(items, start=first)
            ]

    @property
    def _tensors(self) -> Batch | None:
        """Return all examples as one nest of tensors, where they are known to be one."""
        if self.kind == "tensors":
            return self._data
        plain = self.kind == "items" and self._collate is default_collate
        return tensors_behind(self._data) if plain else None

    # --- reading --------------------------------------------------------------------------------
    def _position(self, at: int) -> int:
        return at if self._order is None else int(self._order[at])

    def _read(self, first: int, last: int) -> Batch:
        if self.kind == "tensors":
            return take(self._data, slice(first, last))
        return self._collated(range(first, last))

    def _gather(self, index: Tensor) -> Batch:
        if self.kind == "tensors":
            return take(self._data, index)
        return self._collated(index.tolist())

    def _collated(self, positions: Sequence[int]) -> Batch:
        return self._batch(self._items(positions), positions)

    def _items(self, positions: Sequence[int]) -> list[Any]:
        return [self._item(at) for at in positions]

    def _item(self, at: int) -> Any:
        try:
            return self._data[self._position(at)]
        except (DattriError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise InputError(
                f"{self.name} data: example {at} cannot be read: the data set raised "
                f"{type(error).__name__}: {error}"
            ) from error

    def _batch(self, items: list[Any], positions: Sequence[int]) -> Batch:
        """Put examples into one batch."""
        which = f"example {positions[0]}"
        if len(positions) > 1:
            which = f"examples {min(positions)} to {max(positions)}"
        try:
            batch = self._collate(items)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            fix = "give a DataLoader with a collate_fn that pads"
            if len(items) == 1:
                fix = "a collate function has to make a batch of any one example, and drop none"
            raise InputError(
                f"{self.name} data: {which} cannot be put into one batch ({reason}); {fix}"
            ) from error
        _require_even(batch, self.name)
        if not tensors_of(batch):  # texts, for what reads no numbers
            return batch
        given = batch_size(batch)
        if given != len(items):
            raise InputError(
                f"{self.name} data: the collate function made a batch of {given} of {which}, which "
                f"are {len(items)}, and row i of the scores is example i; keep every example in "
                "it, and leave those that are to be dropped out of the data set"
            )
        return batch

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
            count, content = batch_size(batch), content_of(batch)
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
            first = content_of(self._read(at, at + 1))
            if any(content_of(self._read(at, at + 1)) != first for _ in range(again)):
                raise InputError(
                    f"{self.name} data: example {at} differs when it is read again; switch random "
                    "augmentation off: attribution needs the same example every time"
                )


def _spread(count: int, most: int) -> Tensor:
    """Return up to ``most`` evenly spaced positions: the first, the last, and those between."""
    places = torch.linspace(0, count - 1, min(most, count), dtype=torch.float64).round().long()
    return torch.cat([places[:1], places[1:].flip(0)])


def _unlike_first(batch: Batch, count: int) -> list[int]:
    """Return places of a batch, those of examples that no example before them equals in front."""
    seen: dict[str, int] = {}
    for at in range(count if count > 1 else 0):
        seen.setdefault(digest(take(batch, slice(at, at + 1))), at)
    fresh = list(seen.values())
    return fresh + [at for at in range(count) if at not in fresh]


def _is_nest_of_tensors(data: Any) -> bool:
    if isinstance(data, (Tensor, np.ndarray)):
        return True
    if isinstance(data, tuple):
        return bool(data) and all(_is_nest_of_tensors(value) for value in data)
    if isinstance(data, Mapping):
        return bool(tensors_of(data))
    return False


def _require_even(batch: Batch, name: str) -> None:
    """Raise where a tensor is one of many lengths, which has no rows that could be cut out."""
    nested = [t for t in tensors_of(batch) if t.is_nested]
    if nested:
        raise InputError(
            f"{name} data: a nested tensor of {nested[0].size(0)} examples of unequal length; give "
            "torch.nested.to_padded_tensor(data, 0.0) and a mask that the model reads, or a "
            "DataLoader with a collate_fn that pads"
        )


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
        _require_even(batch, name)
        seen[total] = content_of(batch)
        total += batch_size(batch)
    examples = Examples(name, total, "batches", loader)
    examples._seen = seen
    if total:
        for _ in examples._given():  # a second pass, so that a shuffle shows before long work
            pass
    return examples
