"""The plan of a model: which modules give which blocks, and by which rule."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from attrs import evolve, frozen
from torch import nn

from dattri_core import BlockSpec, Evaluator, Space
from dattri_parts.sources.axes import CallLayout
from dattri_parts.sources.blocks import dense_spec, shared_spec
from dattri_parts.sources.resolve import Resolved, Slot, paths_of
from dattri_parts.sources.rules import LayerRule, rule_for

_log = logging.getLogger("dattri")
_told: set[type] = set()


@frozen(eq=False)
class Piece:
    """What one module adds to one block: local parameter names with the model's names of them."""

    block: str
    own: BlockSpec  # the block as this module's rule lays it out
    trained: Mapping[str, str]


@frozen(eq=False)
class Site:
    """A module that answers for some parameters, by a rule or, without one, by torch.func."""

    module: nn.Module
    path: str
    rule: LayerRule | None
    pieces: Sequence[Piece]

    @property
    def parameters(self) -> set[str]:
        """Return the model's names of the parameters it answers for."""
        return {name for piece in self.pieces for name in piece.trained.values()}


@frozen(eq=False)
class SourcePlan:
    """All sites and the space they fill."""

    sites: tuple[Site, ...]
    space: Space


def make_plan(evaluator: Evaluator, resolved: Resolved, ruleless: set[nn.Module]) -> SourcePlan:
    """Return the sites and blocks for modules that answer for parameters.

    Args:
        evaluator: The task.
        resolved: Which module answers for which.
        ruleless: Modules whose layer rule is left aside.
    """
    paths = paths_of(evaluator.task.model)
    holders: dict[str, int] = {}
    for slot in resolved.handlers:
        holders[slot.parameter] = holders.get(slot.parameter, 0) + 1
    shared = {name for name, count in holders.items() if count > 1}
    sites = []
    for module, path in paths.items():
        slots = [slot for slot, handler in resolved.handlers.items() if handler is module]
        if slots:
            calls = [call for each in resolved.layouts.values() for call in each[module]]
            ruled = module not in ruleless and all(slot.owner is module for slot in slots)
            rule = rule_for(module) if ruled else None
            sites.append(_site(module, path, rule, slots, shared, calls, paths))
    return _with_blocks(sites, shared, evaluator)


def _site(
    module: nn.Module,
    path: str,
    rule: LayerRule | None,
    slots: list[Slot],
    shared: set[str],
    calls: list[CallLayout],
    paths: Mapping[nn.Module, str],
) -> Site:
    if rule is not None and all(suits(rule, call) for call in calls):
        pieces = _by_rule(rule, module, path, {s.local: s.parameter for s in slots}, shared)
        if pieces is not None:
            return Site(module, path, rule, pieces)
    if type(module) not in _told:
        _told.add(type(module))
        _log.info(
            "per-example: no layer rule for %s; torch.func differentiates it for each example",
            f"{type(module).__module__}.{type(module).__qualname__}",
        )
    pieces = []
    for slot in slots:
        inner = paths[slot.owner].removeprefix(path).lstrip(".")
        local = f"{inner}.{slot.local}" if inner else slot.local
        shape = tuple(slot.owner.get_parameter(slot.local).shape)
        own = dense_spec(slot.parameter, slot.parameter, shape)
        pieces.append(Piece(slot.parameter, own, {local: slot.parameter}))
    return Site(module, path, None, pieces)


def suits(rule: LayerRule, call: CallLayout) -> bool:
    """Return whether a rule can make rows of a call."""
    if not call.inputs or len(call.outputs) != 1:
        return False
    spread = call.spreads[0]
    if spread is not None:
        shared = all(axis is None for axis in call.inputs)
        return shared and (not rule.leading or spread.new == 0 == spread.at)
    axes = (call.inputs[0], call.outputs[0])
    return all(axis is not None and (axis.at == 0 or not rule.leading) for axis in axes)


def _by_rule(
    rule: LayerRule,
    module: nn.Module,
    path: str,
    trained: Mapping[str, str],
    shared: set[str],
) -> list[Piece] | None:
    """Return a piece for each shared parameter and one for all others, or None if declined."""
    groups = [{local: name} for local, name in trained.items() if name in shared]
    rest = {local: name for local, name in trained.items() if name not in shared}
    if rest:
        groups.append(rest)
    pieces = []
    for group in groups:
        alone = next(iter(group.values()))
        name = alone if len(group) == 1 else path or type(module).__name__
        spec = rule.spec(name, module, group)
        if spec is None:
            return None
        pieces.append(Piece(name, spec, group))
    return pieces


def _with_blocks(sites: list[Site], shared: set[str], evaluator: Evaluator) -> SourcePlan:
    pieces: dict[str, list[Piece]] = {}
    for site in sites:
        for piece in site.pieces:
            pieces.setdefault(piece.block, []).append(piece)
    specs = {
        name: found[0].own if len(found) == 1 else shared_spec(name, [p.own for p in found])
        for name, found in pieces.items()
    }
    order = {name: at for at, name in enumerate(evaluator.selected)}
    blocks = sorted(
        (evolve(spec, name=name) for name, spec in specs.items()),
        key=lambda spec: min(order[view.parameter] for view in spec.parameters),
    )
    return SourcePlan(tuple(sites), Space(tuple(blocks)))
