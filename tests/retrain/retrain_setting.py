"""A setting whose world is only the toy retraining; it counts how often it is loaded."""

from __future__ import annotations

from types import SimpleNamespace

from attrs import frozen
from toy_retraining import M, N, Toy

LOADED: list[tuple[object, ...]] = []


@frozen
class ToySetting:
    title = "Toy"
    sizes = {"full": (N, M), "small": (8, 3)}
    metrics = ()

    def load(self, size=None, seed=0, wrong=None):
        LOADED.append((size, seed, wrong))
        n_train, n_test = size or self.sizes["full"]
        return SimpleNamespace(retraining=Toy(n_train=n_train, n_test=n_test, together=2))


setting = ToySetting()
