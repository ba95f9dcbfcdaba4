"""Several processes that attribute together, each on a part of the train set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from attrs import frozen
from torch import Tensor
from torch import distributed as torch_distributed

from dattri_core.errors import DattriError, InputError, SpecError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Make = Callable[[], Mapping[str, Tensor]]
FIRST = 0
"""The process whose answer counts where one answer is needed."""


class ProcessError(DattriError):
    """Another process of the group failed; the message is its own."""


@frozen(eq=False)
class Processes:
    """The processes of a `torch.distributed` group, which make the same calls in the same order.

    Every exchange begins with a message from each, so that one which fails is heard of by the
    others wherever they are: none waits for it.

    Args:
        group: The process group.
        rank: Of this process, from 0.
        size: How many there are.
        devices: Types of the devices whose tensors the group can send.
    """

    group: Any
    rank: int
    size: int
    devices: frozenset[str]

    @staticmethod
    def of(group: Any) -> Processes:
        """Return the processes of a group, None for all.

        Raises:
            InputError: There is no group, or this process is not in it.
        """
        if not (torch_distributed.is_available() and torch_distributed.is_initialized()):
            raise InputError(
                "distributed: torch.distributed has no process group; start the script by torchrun "
                "and call torch.distributed.init_process_group() first"
            )
        group = torch_distributed.group.WORLD if group is None else group
        rank = torch_distributed.get_rank(group)
        if rank < 0:
            raise InputError(
                "distributed: this process is not in the group that was given; call it in the "
                "processes of the group alone"
            )
        config = torch_distributed.get_backend_config(group)
        devices = frozenset(entry.partition(":")[0] for entry in str(config).split(","))
        return Processes(group, rank, torch_distributed.get_world_size(group), devices)

    def part(self, count: int) -> tuple[int, int]:
        """Return the range of this process among ``count`` train examples, the last left out."""
        return self._part_of(self.rank, count)

    def _part_of(self, rank: int, count: int) -> tuple[int, int]:
        return count * rank // self.size, count * (rank + 1) // self.size

    # --- messages -------------------------------------------------------------------------------
    def gathered(self, value: T) -> list[T]:
        """Return the small value that each process gives, in their order.

        Raises:
            ProcessError: One of them failed instead.
        """
        return self._exchange(None, value)

    def _exchange(self, failure: str | None, value: Any) -> list[Any]:
        messages: list[Any] = [None] * self.size
        torch_distributed.all_gather_object(messages, (failure, value), group=self.group)
        for rank, (said, _) in enumerate(messages):
            if said is not None and failure is None:
                raise ProcessError(f"process {rank} of {self.size} failed: {said}")
        return [given for _, given in messages]

    def fail(self, error: Exception) -> None:
        """Let the others know that this process goes no further."""
        self._exchange(f"{type(error).__name__}: {error}", None)

    def first(self, value: T) -> T:
        """Return the small value of the first process."""
        return self.gathered(value)[FIRST]

    # --- tensors --------------------------------------------------------------------------------
    def total(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Return the sum over all processes of tensors by name; one that lacks a name adds 0.

        Raises:
            SpecError: Two of them have tensors of other shapes or types under one name.
        """
        known: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for said in self.gathered(_described(tensors)):
            for name, form in said.items():
                if known.setdefault(name, form) != form:
                    raise SpecError(
                        f"distributed: the sum over the train set named {name!r} has shape and "
                        f"type {known[name]} in one process and {form} in another; read it in one "
                        "process"
                    )
        found = {}
        for name, (shape, dtype) in known.items():
            held = tensors.get(name)
            here = torch.zeros(shape, dtype=dtype, device=device) if held is None else held
            sent = self._sendable(here).contiguous()
            torch_distributed.all_reduce(sent, group=self.group)
            found[name] = sent.to(here.device)
        return found

    def agreed(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Return the tensors of the first process, bit for bit, in every one."""
        return self.collected(tensors if self.rank == FIRST else {}, device)

    def made(
        self,
        found: Callable[[Make], Mapping[str, Tensor]],
        make: Make,
        device: torch.device,
    ) -> dict[str, Tensor]:
        """Return the tensors that the first process finds, or that all of them make together.

        Eigenvectors of one matrix, computed twice, may differ in their signs: the first process's
        are everyone's.

        Args:
            found: Gives the tensors, and calls its argument where they are not there yet.
            make: Makes them; all processes do where the first one does.
            device: Where they are to live.
        """
        tensors: Mapping[str, Tensor] = {}
        if self.rank == FIRST:
            asked: list[bool] = []

            def together() -> Mapping[str, Tensor]:
                asked.append(True)
                self.first(True)
                return make()

            tensors = found(together)
            if not asked:
                self.first(False)
        elif self.first(False):
            make()
        return self.agreed(tensors, device)

    def collected(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Return the tensors of all processes, of which each gives some names.

        Args:
            tensors: Those of this process; a name is given by one of them.
            device: Where they are to live.
        """
        found = {}
        for rank, said in enumerate(self.gathered(_described(tensors))):
            for name, (shape, dtype) in said.items():
                mine = rank == self.rank
                here = tensors[name] if mine else torch.empty(shape, dtype=dtype, device=device)
                found[name] = self._broadcast(here.contiguous(), rank).to(device)
        return found

    def joined(
        self, parts: Mapping[str, Tensor], count: int, device: torch.device
    ) -> dict[str, Tensor]:
        """Return tensors of ``count`` train examples, put together from each process's `part`.

        Args:
            parts: By name, of the examples of this process; nothing where it has none.
            count: Train examples.
            device: Where they are to live.
        """
        known: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for said in self.gathered(_described(parts)):
            known |= said
        found = {}
        for name, (shape, dtype) in known.items():
            whole = torch.empty(count, *shape[1:], dtype=dtype, device=device)
            for rank in range(self.size):
                start, stop = self._part_of(rank, count)
                if start == stop:
                    continue
                here = parts[name] if rank == self.rank else whole[start:stop]
                whole[start:stop] = self._broadcast(here.contiguous(), rank)
            found[name] = whole
        return found

    def _broadcast(self, values: Tensor, rank: int) -> Tensor:
        sent = self._sendable(values)
        source = torch_distributed.get_global_rank(self.group, rank)
        torch_distributed.broadcast(sent, source, group=self.group)
        return sent

    def _sendable(self, values: Tensor) -> Tensor:
        """Return values on a device whose tensors the group can send."""
        if values.device.type in self.devices:
            return values
        other = "cpu" if "cpu" in self.devices else next(iter(self.devices))
        return values.to(other)


_now: ContextVar[Processes | None] = ContextVar("processes", default=None)
_watched: ContextVar[bool] = ContextVar("watched", default=False)


def processes_now() -> Processes | None:
    """Return the processes that share the work here; None where there is one."""
    return _now.get()


def leads() -> bool:
    """Return whether this process does what one of them has to do, such as writing a file."""
    processes = processes_now()
    return processes is None or processes.rank == FIRST


def of_first(value: T) -> T:
    """Return the small value of the process that leads."""
    processes = processes_now()
    return value if processes is None else processes.first(value)


def anywhere(here: bool) -> bool:
    """Return whether something holds in this process or in another that shares the work."""
    processes = processes_now()
    return here if processes is None else any(processes.gathered(here))


@contextmanager
def distributed(group: Any = None) -> Iterator[None]:
    """Share the work of the calls inside among the processes of a `torch.distributed` group.

    Every process of the group makes the same calls with the same arguments, on a device of its own
    (`Task(device=...)`, or where the model lives), and gets the whole result: the scores are those
    of one process up to the rounding of sums. Each evaluates the gradients of its part of the train
    set; sums over the train set, such as the factors of 'ekfac', are added up once a pass, and rows
    after a sketch are computed once. Products with a curvature of the whole train set, and what is
    asked of a test set, are computed by each.

    Args:
        group: Default all processes.

    Raises:
        InputError: No process group was made, or this process is not in it.
    """
    processes = Processes.of(group)
    token = _now.set(processes if processes.size > 1 else None)
    try:
        yield
    finally:
        _now.reset(token)


def failing_together(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function as one whose failure all processes hear of, at their next exchange."""

    @wraps(function)
    def heard(*args: P.args, **kwargs: P.kwargs) -> R:
        processes = processes_now()
        if processes is None or _watched.get():  # the outermost call speaks
            return function(*args, **kwargs)
        token = _watched.set(True)
        try:
            return function(*args, **kwargs)
        except ProcessError:
            raise
        except Exception as error:
            processes.fail(error)
            raise
        finally:
            _watched.reset(token)

    return heard


def _described(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
