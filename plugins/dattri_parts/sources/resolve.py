"""Who answers for each parameter: its own module, or the nearest module around it that can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import define, frozen
from torch import Tensor, nn

from dattri_core import Evaluator, InputError, take
from dattri_parts.sources.axes import LARGE, SMALL, CallLayout, Spread, spreads_of
from dattri_parts.sources.observe import Observation, is_shared, layouts_of, observe

Call = tuple[nn.Module, int]
CURE = "use the source 'functional', which differentiates any function of the parameters"


@frozen(eq=False)
class Slot:
    """One place where a parameter sits: a module owns it under a local name."""

    parameter: str
    owner: nn.Module
    local: str


@define(eq=False)
class Resolved:
    """For every slot the module that answers for it, and the layouts of the modules' calls."""

    handlers: dict[Slot, nn.Module]
    layouts: dict[str, dict[nn.Module, list[CallLayout]]]


def slots_of(model: nn.Module, selected: Mapping[str, Any]) -> list[Slot]:
    """Return every place of the selected parameters; a tied weight has several."""
    names = {id(p): name for name, p in model.named_parameters() if name in selected}
    return [
        Slot(names[id(parameter)], module, local)
        for module in model.modules()
        for local, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in names
    ]


def paths_of(model: nn.Module) -> dict[nn.Module, str]:
    """Return the first path of every module."""
    return {module: path for path, module in model.named_modules()}


def parents_of(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return the module around each module, along its first path."""
    paths = paths_of(model)
    modules = dict(model.named_modules())
    return {m: modules[path.rpartition(".")[0]] for m, path in paths.items() if path}


def resolve(
    evaluator: Evaluator,
    slots: list[Slot],
    sample: Any,
    refused: set[nn.Module],
    roles: Sequence[str],
) -> Resolved:
    """Find for each slot a module whose calls tell examples apart.

    A parameter's own module is tried first. When nobody calls it (``out_proj`` of an attention, a
    ``ParameterList``), or its calls do not show which axis counts examples, the module around it
    answers. An output that all examples share is repeated for each of them where it meets them by
    broadcasting, except those of the modules ``refused``. The functions of all ``roles`` are looked
    at.

    Raises:
        InputError: No module around a parameter can answer for it.
    """
    model = evaluator.task.model
    paths, parents = paths_of(model), parents_of(model)
    watched = _around({slot.owner for slot in slots}, parents)
    handlers = {slot: slot.owner for slot in slots}
    spreads: dict[str, dict[tuple[nn.Module, int], Spread]] = {role: {} for role in roles}
    batches = [take(sample, torch.arange(size)) for size in (SMALL, LARGE)]

    while True:
        answering = set(handlers.values())
        seen = {
            role: [observe(evaluator, watched, batch, role, spreads[role]) for batch in batches]
            for role in roles
        }
        layouts, stuck = _layouts(seen, answering, spreads)
        shared = None if stuck else _first_shared(seen, layouts, answering)
        if shared is not None:
            role, call = shared
            found = None
            if call[0] not in refused:
                found = _find_spread(evaluator, call, batches, role, seen[role], spreads[role])
            if found is not None:
                spreads[role][call] = found
                continue
            stuck.add(call[0])
        if not stuck:
            return Resolved(handlers, layouts)
        for slot, module in list(handlers.items()):
            if module in stuck:
                handlers[slot] = _parent(slot, module, parents, paths)
        for role in roles:
            spreads[role] = {k: s for k, s in spreads[role].items() if k[0] not in stuck}


def _layouts(
    seen: Mapping[str, list[Observation]],
    answering: set[nn.Module],
    spreads: Mapping[str, Mapping[tuple[nn.Module, int], Spread]],
) -> tuple[dict[str, dict[nn.Module, list[CallLayout]]], set[nn.Module]]:
    layouts: dict[str, dict[nn.Module, list[CallLayout]]] = {role: {} for role in seen}
    stuck: set[nn.Module] = set()
    for module in answering:
        for role in seen:
            found = layouts_of(seen[role], module, spreads[role])
            layouts[role][module] = found or []
            if found is None:
                stuck.add(module)
        if not any(layouts[role][module] for role in seen):
            stuck.add(module)
    return layouts, stuck


def _first_shared(
    seen: Mapping[str, list[Observation]],
    layouts: Mapping[str, Mapping[nn.Module, list[CallLayout]]],
    answering: set[nn.Module],
) -> tuple[str, Call] | None:
    """Return the first call, in the order of the model, whose output all examples share."""
    for role in seen:
        for module, at in seen[role][0].order:
            if module in answering and is_shared(
                layouts[role][module][at], seen[role][0].calls[module][at]
            ):
                return role, (module, at)
    return None


def _find_spread(
    evaluator: Evaluator,
    call: Call,
    batches: list[Any],
    role: str,
    seen: list[Observation],
    spreads: Mapping[Call, Spread],
) -> Spread | None:
    """Return the first way to repeat a shared output that leaves the loss as it is."""
    shape = seen[0].calls[call[0]][call[1]].outputs[0]
    for spread in spreads_of(shape):
        tried = {**spreads, call: spread}
        watched = dict.fromkeys(module for module, _ in tried)
        try:
            after = [observe(evaluator, watched, batch, role, tried) for batch in batches]
        except (RuntimeError, IndexError, ValueError):  # the shapes do not meet
            continue
        if all(_close(one.total, two.total) for one, two in zip(after, seen, strict=True)):
            return spread
    return None


def _close(left: Tensor, right: Tensor) -> bool:
    loose = {torch.float64: 1e-8, torch.float32: 1e-4}.get(left.dtype, 5e-2)
    return torch.allclose(left, right, rtol=loose, atol=loose * 1e-2)


def _around(
    modules: set[nn.Module], parents: Mapping[nn.Module, nn.Module]
) -> tuple[nn.Module, ...]:
    found: dict[nn.Module, None] = {}
    for module in modules:
        current: nn.Module | None = module
        while current is not None and current not in found:
            found[current] = None
            current = parents.get(current)
    return tuple(found)


def _parent(
    slot: Slot,
    module: nn.Module,
    parents: Mapping[nn.Module, nn.Module],
    paths: Mapping[nn.Module, str],
) -> nn.Module:
    if module in parents:
        return parents[module]
    raise InputError(
        f"per-example: no gradient of its own per example for {slot.parameter!r}: neither its "
        f"module ({type(slot.owner).__name__} at {paths[slot.owner]!r}) nor one around it is "
        f"called with an axis that counts examples; {CURE}"
    )
