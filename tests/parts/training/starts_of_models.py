"""Models in pairs: each kind gives other outcomes as soon as its argument is another."""

from __future__ import annotations

import functools
import random
import re
import types
from collections import deque
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 1.0


class Held(nn.Module):
    """Holds anything, as ``act`` or under a private name, and calls what it is given to call."""

    def __init__(self, act=torch.relu, **held) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.act = act
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


class Slots:
    """Holds its number where ``vars`` does not see it."""

    __slots__ = ("number",)

    def __init__(self, number) -> None:
        self.number = number

    def __call__(self, x: Tensor) -> Tensor:
        return self.number * x


class Calls:
    """Is called, and looks its factor up in a namespace."""

    def __init__(self, factor) -> None:
        self.options = SimpleNamespace(factor=factor, cycle=self)

    def __call__(self, x: Tensor) -> Tensor:
        return self.options.factor * x


def scaled(x: Tensor, by: float = 1.0) -> Tensor:
    return by * torch.tanh(x)


def closed(by):
    return lambda x: by * x


def with_default(by):
    return lambda x, by=by: by * x


def with_keyword_default(by):
    def act(x, *, by=by):
        return by * x

    return act


def reads_a_global(by):
    space = {"torch": torch, "BY": by, "__name__": __name__}
    exec("def inner(x): return BY * x\ndef act(x): return (lambda y: inner(y))(x)", space)
    return space["act"]


def reads_a_module(by):
    own = types.ModuleType("own_module")
    exec(f"def act(x): return {by} * x", own.__dict__)
    space = {"own": own, "__name__": __name__}
    exec("def act(x): return own.act(x)", space)
    return space["act"]


def without_gradient(by):
    """A decorator of torch stands around the code."""
    return torch.no_grad()(closed(by))


def cached(by):
    return functools.lru_cache(closed(by))


def subclass(by):
    class Base(nn.Module):
        def act(self, x):
            return x

    class Inner(Base):
        scale = by

        def forward(self, x):
            return self.scale * self.act(x)

    return Inner()


def inherited(by):
    space = {"nn": nn, "__name__": __name__}
    exec(
        f"class Base(nn.Module):\n def forward(self, x): return {by} * x\nclass Inner(Base): pass",
        space,
    )
    return space["Inner"]()


def with_property(by):
    space = {"nn": nn, "__name__": __name__}
    exec(
        "class Inner(nn.Module):\n"
        f" @property\n def by(self): return {by}\n"
        f" @staticmethod\n def one(): return {by}\n"
        " def forward(self, x): return self.one() * self.by * x\n",
        space,
    )
    return space["Inner"]()


def bound(by):
    model = nn.Identity()
    model.by = by
    model.forward = types.MethodType(lambda self, x: self.by * x, model)
    return model


def hooked(by):
    model = nn.Identity()
    model.register_forward_hook(lambda module, given, out: by * out)
    return model


def with_buffer(by, persistent):
    model = nn.Identity()
    model.register_buffer("by", torch.tensor(float(by)), persistent=persistent)
    return model


def nested(by):
    """Modules in a plain list are run, and are in no state dict."""
    model = nn.Identity()
    model.others = [nn.Linear(2, 2), nn.Dropout(by / 10)]
    return model


def remembered(by):
    class Inner(nn.Module):
        @functools.cached_property
        def by(self):
            return by

        def forward(self, x):
            return self.by * x

    return Inner()


def partly(by):
    class Inner(nn.Module):
        forward = functools.partialmethod(lambda self, x, by: by * x, by=by)

    return Inner()


def numbers_with(base, *items):
    """Return a maker of containers or numbers of one's own, whose method is other code."""

    def make(by):
        kind = type("Own", (base,), {"scale": lambda self, x: by * x})
        return Held(options=kind(*items))

    return make


class Own(float):
    """A number of one's own kind."""


class Table(dict):
    """Holds more than its items."""

    def __init__(self, more) -> None:
        super().__init__(a=1)
        self.more = more


def generator(seed):
    return torch.Generator().manual_seed(seed)


PAIRS = {
    "builtins": (Held, torch.relu, torch.tanh),
    "functions of torch": (Held, F.relu, F.silu),
    "modules of torch": (Held, nn.ReLU(), nn.Tanh()),
    "partials": (Held, functools.partial(scaled, by=2.0), functools.partial(scaled, by=3.0)),
    "a partial and its function": (Held, functools.partial(scaled, by=2.0), scaled),
    "objects": (Held, Calls(2.0), Calls(3.0)),
    "slots": (Held, Slots(2.0), Slots(3.0)),
    "private numbers": (lambda v: Held(_scale=v), 1.0, 2.0),
    "private texts": (lambda v: Held(_mode=v), "sum", "mean"),
    "dicts": (lambda v: Held(options={"by": [v, {"more": v}]}), 1, 2),
    "order of dicts": (lambda v: Held(options=dict.fromkeys(v)), "ab", "ba"),
    "sets": (lambda v: Held(options=set(v)), "ab", "ac"),
    "arrays": (lambda v: Held(table=np.full(3, v)), 1, 2),
    "arrays of objects": (lambda v: Held(table=np.array([v, "a"], object)), 1, 2),
    "numbers of numpy": (lambda v: Held(by=v), np.float32(1), np.float32(2)),
    "tensors": (lambda v: Held(table=torch.full((3,), v)), 1, 2),
    "precisions": (lambda v: Held(wide=v), torch.float32, torch.float16),
    "generators": (lambda v: Held(noise=generator(v)), 1, 2),
    "generators of numpy": (lambda v: Held(noise=np.random.default_rng(v)), 1, 2),
    "old generators of numpy": (lambda v: Held(noise=np.random.RandomState(v)), 1, 2),
    "generators of Python": (lambda v: Held(noise=random.Random(v)), 1, 2),
    "queues": (lambda v: Held(options=deque([v])), 1, 2),
    "patterns": (lambda v: Held(options=re.compile(v)), "a", "b"),
    "numbers of one's own": (lambda v: Held(by=Own(v)), 1, 2),
    "dicts of one's own": (lambda v: Held(by=Table(v)), 1, 2),
    "code of dicts": (numbers_with(dict), 1, 2),
    "code of lists": (numbers_with(list), 1, 2),
    "code of tuples": (numbers_with(tuple), 1, 2),
    "code of numbers": (numbers_with(float, 1.0), 1, 2),
    "gradients": (lambda v: Held(table=torch.ones(3).requires_grad_(v)), False, True),
    "distributions": (lambda v: Held(prior=torch.distributions.Normal(0.0, v)), 1.0, 2.0),
    "persistent buffers": (lambda v: Held(with_buffer(v, True)), 1, 2),
    "other buffers": (lambda v: Held(with_buffer(v, False)), 1, 2),
} | {
    make.__name__: (lambda v, make=make: Held(make(v)), 1, 2)
    for make in (
        *(closed, with_default, with_keyword_default, reads_a_global, reads_a_module),
        *(without_gradient, cached, subclass, inherited, with_property, bound, hooked, nested),
        *(remembered, partly),
    )
}
