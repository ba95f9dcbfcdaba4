"""Functions and classes of all kinds, whose description is recorded: no version gives another."""

from __future__ import annotations

import abc
import collections
import dataclasses
import enum
import functools
import typing

import attrs
import torch
from torch import nn

SCALE = 2.0
Item = typing.TypeVar("Item")


class Mode(enum.Enum):
    SUM = "sum"
    MEAN = "mean"

    def apply(self, x):
        return x.sum() if self is Mode.SUM else x.mean()


class Kind(str, enum.Enum):
    FIRST = "a"


class Bits(enum.IntFlag):
    ONE = 1
    TWO = 2


@attrs.frozen
class Own:
    rate: float = attrs.field(default=1.0, converter=float, validator=attrs.validators.ge(0))
    more: list[int] = attrs.field(factory=list)

    def scaled(self):
        return SCALE * self.rate


@attrs.define(eq=False)
class Remembers:
    rate: float = 1.0

    @functools.cached_property
    def twice(self):
        return 2 * self.rate


class Pair(typing.NamedTuple):
    first: int
    second: float = 2.0

    def total(self):
        return self.first + self.second


Plain = collections.namedtuple("Plain", "first second", defaults=[3])


class Base(abc.ABC):
    @abc.abstractmethod
    def go(self): ...


class Does(Base, typing.Generic[Item]):
    def go(self):
        return [i * j for i in range(3) for j in range(i) if j]


class Speaks(typing.Protocol):
    def go(self) -> int: ...


class Silent(Speaks):
    def go(self) -> int:
        return 2


class Fancy(nn.Module):
    """A docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.__own = 2
        self.linear = nn.Linear(2, 2)

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def many(self, x: torch.Tensor, *rest: int, gain: float = SCALE) -> float:
        """Another."""

        def inner(z: torch.Tensor, w=lambda q: q + 1) -> str:
            return f"{z!r:>{gain}} {{}} more{w(2)=} {z:}"

        table = {name: value for name, value in zip("ab", x, strict=True) if (last := value)}
        try:
            with torch.no_grad():
                del inner
        except (ValueError, TypeError) as error:
            raise RuntimeError from error
        match table:
            case {"a": [first, *others], **left} if first:
                return len(others) + len(left)
            case None | True:
                return -0.0
        return self.__own * sum(i for i in range(last)) + 10**20 + 1j.imag + super().extra_repr()

    async def waits(self, *, many=(1, 2)):
        async for each in self:
            yield await each, b"bytes", ..., not many[1:], *many


def first_of_two(x):
    return second_of_two(x)


def second_of_two(x):
    return first_of_two(x) if x else torch.relu(x)


CLASSES = [Mode, Kind, Bits, Own, Remembers, Pair, Plain, Does, Silent, Fancy]
VALUES = [
    *CLASSES,
    *(Mode.SUM, Kind.FIRST, Bits.ONE | Bits.TWO, Own(2), Remembers(3.0), Pair(1), Plain(1)),
    *(first_of_two, functools.partial(first_of_two, x=1), lambda x: x if x else [SCALE]),
]


def made_dataclass(more: int = 0, **options):
    @dataclasses.dataclass(**options)
    class Config:
        width: int = 3
        names: list[str] = dataclasses.field(default_factory=list)

        def scaled(self):
            return self.width + more

    return Config


if hasattr(made_dataclass.__code__, "co_qualname"):
    VALUES.append(made_dataclass(frozen=True, order=True))
