"""A registry with the toy setting."""

from __future__ import annotations

import pytest
from dattri_retrain.settings import _load
from retrain_setting import LOADED

from dattri_core.registry import Registry, default_registry, using


@pytest.fixture
def toy_setting():
    registry = Registry()
    registry.merge(default_registry())
    own = Registry()
    own.part("setting", "toy", "retrain_setting:setting")
    registry.merge(own)
    _load.cache_clear()
    LOADED.clear()
    with using(registry):
        yield registry
    _load.cache_clear()
