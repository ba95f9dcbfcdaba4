"""Hooks: each reaches a plugin that has it, and a run tells what the guide says it tells."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import nn

import dattri_core as dattri
from dattri_core.discovery import Origin, Plugin, admit
from dattri_core.hookspecs import EVENTS, HOOKS
from dattri_core.registry import Registry, default_registry, using

Heard = list[tuple[str, dict[str, Any]]]


def listening_plugin(heard: Heard) -> types.SimpleNamespace:
    """Return a plugin with every hook there is; it keeps what it hears."""

    def register(registry: Any) -> None:
        heard.append(("register", {"registry": registry}))

    def listener(event: str) -> Callable[..., None]:
        def hear(info: Mapping[str, Any]) -> None:
            heard.append((event, dict(info)))

        hear.__name__ = event
        return hear

    hooks = {"register": register, **{event: listener(event) for event in EVENTS}}
    return types.SimpleNamespace(**{n: dattri.hookimpl(f) for n, f in hooks.items()})


@pytest.fixture
def heard() -> Iterator[Heard]:
    """What a plugin with every hook hears while the test runs."""
    told: Heard = []
    registry = Registry()
    registry.merge(default_registry())
    plugin = Plugin(Origin("listener"), "listener", "loaded")
    callers = admit(listening_plugin(told), "listener", registry)
    registry._plugins.append(evolve(plugin, listeners=callers))
    with using(registry):
        yield told


def test_the_hooks_are_these() -> None:
    assert set(HOOKS) == {
        "register",
        "run_started",
        "block_scored",
        "run_finished",
        "cell_finished",
    }


def test_register_is_called_once_with_the_registry(heard: Heard) -> None:
    assert [event for event, _ in heard] == ["register"]
    assert isinstance(heard[0][1]["registry"], Registry)


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_reaches_its_listener_and_no_other(event: str, heard: Heard) -> None:
    heard.clear()
    default_registry().emit(event, {"seconds": 1.5})
    assert heard == [(event, {"seconds": 1.5})]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_run_tells_when_it_starts_what_is_done_and_when_it_ends(
    heard: Heard, on_disk: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    train = (torch.randn(11, 3), torch.randint(2, (11,)))
    test = (torch.randn(4, 3), torch.randint(2, (4,)))
    task = dattri.Task(nn.Linear(3, 2))
    heard.clear()
    out = tmp_path / "scores" if on_disk else None
    scores = dattri.attribute(task, train, test, method="grad-dot", out=out)

    events = [event for event, _ in heard]
    assert events[0] == "run_started"
    assert events[-1] == "run_finished"
    assert set(events[1:-1]) == {"block_scored"}
    started, finished = heard[0][1], heard[-1][1]
    assert started["method"] == dattri.method("grad-dot").to_spec()
    assert (started["n_train"], started["n_test"]) == (11, 4)
    assert started["checkpoints"] == ["current weights"]
    blocks = [info for event, info in heard if event == "block_scored"]
    assert blocks[-1] == {"done": 11, "total": 11}
    assert [info["done"] for info in blocks] == sorted(info["done"] for info in blocks)
    assert finished["method"] == started["method"]
    assert finished["seconds"] >= 0
    assert dict(finished["provenance"]) == dict(scores.provenance)
