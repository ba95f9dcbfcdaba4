"""The retraining of a setting, spelled as plain data: a process or machine makes it again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from attrs import field, fields, frozen
from dattri_parts.choices import setting_of
from torch import Tensor

from dattri_core import Counterfactual, Retraining, SpecError, nearest

Array = np.ndarray[Any, Any]
_loading = threading.Lock()


def _as_size(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given


@frozen
class SettingRetraining:
    """The retraining of a registered setting; it is loaded where and when it is first used.

    It holds name, fields and arguments of the setting alone, so it goes to other processes and
    machines however large the data are, as long as these have the setting.

    Args:
        setting: Registered name; ``NAME:FIELD=VALUE`` changes a field of the setting, any number
            of them one after another.
        size: (train, test) examples; the setting's full size by default.
        seed: Of the world.
        wrong: Share of wrong labels; the setting's own by default.
    """

    setting: str
    size: tuple[int, int] | None = field(default=None, converter=_as_size)
    seed: int = 0
    wrong: float | None = None

    @property
    def loaded(self) -> Retraining:
        """Return the retraining; a process loads it once."""
        with _loading:
            return _load(self)

    @property
    def fingerprint(self) -> str:
        """Return that of the setting's retraining."""
        return self.loaded.fingerprint

    @property
    def n_train(self) -> int:
        """Return the number of train examples."""
        return self.loaded.n_train

    @property
    def n_test(self) -> int:
        """Return the number of test examples."""
        return self.loaded.n_test

    @property
    def train_data(self) -> Any:
        """Return the train set, where the setting's retraining shows it; None elsewhere."""
        return getattr(self.loaded, "train_data", None)

    @property
    def test_data(self) -> Any:
        """Return the test set, where the setting's retraining shows it; None elsewhere."""
        return getattr(self.loaded, "test_data", None)

    @property
    def targets(self) -> Mapping[str, bool]:
        """Return what is measured."""
        return self.loaded.targets

    @property
    def together(self) -> int:
        """Return how many are best trained by one call."""
        return self.loaded.together

    def train(self, counterfactuals: Sequence[Counterfactual]) -> Iterator[Mapping[str, Tensor]]:
        """Yield a state dict for each counterfactual."""
        return self.loaded.train(counterfactuals)

    def measure(self, state: Mapping[str, Tensor]) -> Mapping[str, Array]:
        """Return the outcomes of one model."""
        return self.loaded.measure(state)


def as_retraining(given: Any) -> Any:
    """Return a retraining: as it is, or a `SettingRetraining` from a mapping of its fields.

    Raises:
        SpecError: A field of the mapping is misspelt, or the setting is not named.
    """
    if not isinstance(given, Mapping):
        return given
    known = [a.name for a in fields(SettingRetraining)]
    for name in given:
        if name not in known:
            raise SpecError(f"retraining of a setting: no field {name!r}; {nearest(name, known)}")
    if "setting" not in given:
        raise SpecError("retraining of a setting: needs the name of one under 'setting'")
    return SettingRetraining(**given)


@lru_cache(maxsize=2)
def _load(made: SettingRetraining) -> Retraining:
    setting = setting_of(made.setting)
    make = getattr(setting, "retraining", None)  # of settings that can without training a network
    if make is not None:
        alone: Retraining = make(made.size, seed=made.seed, wrong=made.wrong)
        return alone
    world = setting.load(made.size, seed=made.seed, wrong=made.wrong)
    retraining: Retraining = world.retraining
    return retraining
