"""Who answers for each parameter: its own module, or the nearest module around it that can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from dattri_core import Evaluator, InputError, batch_size, take
from dattri_parts.sources.axes import CallLayout, Spread, spreads_of
from dattri_parts.sources.observe import Observation, Output, layouts_of, observe

Layouts = dict[str, dict[nn.Module, list[CallLayout]]]
"""Of the calls of modules, by role."""
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
    layouts: Layouts


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
    rejected: set[nn.Module],
    roles: Sequence[str],
) -> Resolved:
    """Find for each slot a module whose calls tell examples apart.

    A parameter's own module is tried first. When nobody calls it (``out_proj`` of an attention, a
    ``ParameterList``), its calls do not show which axis counts examples, or it is among the
    ``rejected``, the module around it answers. An output that all examples share is repeated for
    each of them where it meets them by broadcasting, except those of the modules ``refused``, which
    then do not answer either. One beside others that tell examples apart may also be left as it is:
    what it is good for is not known yet. The functions of all ``roles`` are looked at.

    Raises:
        InputError: No module around a parameter can answer for it.
    """
    model = evaluator.task.model
    paths, parents = paths_of(model), parents_of(model)
    watched = _around({slot.owner for slot in slots}, parents)
    handlers = {slot: slot.owner for slot in slots}
    look = _Look(evaluator, watched, sample, refused, roles)
    while True:
        answering = set(handlers.values())
        layouts, stuck = look.layouts(answering)
        stuck |= {m for m in answering if not any(calls[m] for calls in layouts.values())}
        stuck |= answering & rejected
        if not stuck:
            return Resolved(handlers, layouts)
        for slot, module in list(handlers.items()):
            if module in stuck:
                handlers[slot] = _parent(slot, module, parents, paths)
        look.forget(stuck)


def layouts_in(
    evaluator: Evaluator,
    modules: set[nn.Module],
    batch: Any,
    refused: set[nn.Module],
    role: str,
) -> dict[nn.Module, list[CallLayout]] | None:
    """Return the layouts of the calls that modules get with a batch, or None if one is unclear."""
    look = _Look(evaluator, tuple(modules), batch, refused, (role,))
    layouts, stuck = look.layouts(modules)
    return None if stuck else layouts[role]


@define(eq=False)
class _Look:
    """A look at the calls of modules with some examples, and with one more.

    The one more is the first again: what a model does may depend on whether a batch holds an
    example of some kind (one that needs padding), which then both do.
    """

    evaluator: Evaluator
    watched: tuple[nn.Module, ...]
    sample: Any
    refused: set[nn.Module]
    roles: Sequence[str]
    _spreads: dict[str, dict[Output, Spread]] = field(factory=dict, init=False)
    _left: set[Output] = field(factory=set, init=False)

    def layouts(self, answering: set[nn.Module]) -> tuple[Layouts, set[nn.Module]]:
        """Return the layouts of the calls of modules, and which of these cannot answer."""
        count = batch_size(self.sample)
        more = torch.cat([torch.arange(count), torch.zeros(1, dtype=torch.long)])
        batches = [self.sample, take(self.sample, more)]
        spreads = self._spreads or {role: {} for role in self.roles}
        self._spreads = spreads
        while True:
            seen = {
                role: [
                    observe(self.evaluator, self.watched, batch, role, spreads[role])
                    for batch in batches
                ]
                for role in self.roles
            }
            layouts, stuck = _layouts(seen, answering, spreads)
            shared = None if stuck else _first_shared(seen, layouts, answering, self._left)
            if shared is None:
                return layouts, stuck
            role, output = shared
            module, call, _ = output
            found = None
            if module not in self.refused:
                found = _find_spread(
                    self.evaluator, output, batches, role, seen[role], spreads[role]
                )
            if found is not None:
                spreads[role][output] = found
            elif module not in self.refused and len(layouts[role][module][call].outputs) > 1:
                self._left.add(output)
            else:
                return layouts, {module}

    def forget(self, modules: set[nn.Module]) -> None:
        """Forget how outputs of modules are repeated, which do not answer any more."""
        for role, known in self._spreads.items():
            self._spreads[role] = {k: s for k, s in known.items() if k[0] not in modules}


def _layouts(
    seen: Mapping[str, list[Observation]],
    answering: set[nn.Module],
    spreads: Mapping[str, Mapping[Output, Spread]],
) -> tuple[Layouts, set[nn.Module]]:
    layouts: Layouts = {role: {} for role in seen}
    stuck: set[nn.Module] = set()
    for module in answering:
        for role in seen:
            found = layouts_of(seen[role], module, spreads[role])
            layouts[role][module] = found or []
            if found is None:
                stuck.add(module)
    return layouts, stuck


def _first_shared(
    seen: Mapping[str, list[Observation]],
    layouts: Mapping[str, Mapping[nn.Module, list[CallLayout]]],
    answering: set[nn.Module],
    left: set[Output],
) -> tuple[str, Output] | None:
    """Return the first output, in the order of the model, that all examples share."""
    for role in seen:
        for module, at in seen[role][0].order:
            shared = layouts[role][module][at].shared if module in answering else ()
            for output in ((module, at, which) for which in shared):
                if output not in left:
                    return role, output
    return None


def _find_spread(
    evaluator: Evaluator,
    output: Output,
    batches: list[Any],
    role: str,
    seen: list[Observation],
    spreads: Mapping[Output, Spread],
) -> Spread | None:
    """Return the first way to repeat a shared output that leaves the loss as it is."""
    module, call, which = output
    for spread in spreads_of(seen[0].calls[module][call].outputs[which]):
        tried = {**spreads, output: spread}
        watched = dict.fromkeys(module for module, _, _ in tried)
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
