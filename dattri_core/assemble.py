"""Assembling: names and mappings to parts, parts to descriptions, overrides to their fields."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import attrs

from dattri_core import describe, fields, protocols
from dattri_core.describe import UNREGISTERED
from dattri_core.entries import spell_kind
from dattri_core.errors import DattriError, SpecError, nearest
from dattri_core.registry import default_registry
from dattri_core.words import require_words

PROTOCOLS: dict[str, type] = {
    kind: getattr(protocols, name) for name, kind in fields.PROTOCOL_KINDS.items()
}
DEFAULTS = {
    "source": "per-example",
    "projector": "identity",
    "inverse_hessian": "identity",
    "scorer": "dot",
    "fold": "mean",
}
"""The parts of the plainest method, by slot; `Method` has the same defaults."""

STAGE_KINDS = ("projector", "inverse_hessian")
SLOTS = (*DEFAULTS, "stages", "seed")
COMPOSED = "composed"
"""Name of the inverse Hessian that a mapping without a name spells: curvature and solver."""

Path = tuple[str, ...]


# --- data to parts --------------------------------------------------------------------------------
def build_part(kind: str, value: Any) -> Any:
    """Return a part from its name, from ``{"name": ..., fields}``, or as it is.

    A field that the part itself lacks is handed to the one part inside it that has the field.

    Raises:
        SpecError: No such name or field, a value of the wrong type, or an object that does not
            answer the protocol of its kind.
    """
    if isinstance(value, str):
        return _conforming(kind, default_registry().make(kind, value))
    if isinstance(value, Mapping):
        return _conforming(kind, _from_mapping(kind, value))
    return _conforming(kind, value)


def build_inverse_hessian(value: Any) -> Any:
    """Return an inverse Hessian; ``{"curvature": ..., "solver": ...}`` is one by itself."""
    return build_part("inverse_hessian", value)


def build_stages(value: Any) -> tuple[Any, ...]:
    """Return stages from a list of ``{"projector": ...}`` and ``{"inverse_hessian": ...}``."""
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise SpecError(
            f"stages: got {value!r}, expected a list such as "
            '[{"inverse_hessian": {...}}, {"projector": "..."}]'
        )
    return tuple(_stage(position, item) for position, item in enumerate(value))


def _stage(position: int, item: Any) -> Any:
    if isinstance(item, Mapping):
        if len(item) == 1 and next(iter(item)) in STAGE_KINDS:
            ((kind, part),) = item.items()
            return build_part(kind, part)
    elif not isinstance(item, str) and _kind_of_stage(item) is not None:
        return item
    raise SpecError(
        f"stages: item {position} is {item!r}, expected a mapping with the one key 'projector' or "
        "'inverse_hessian', or such a part"
    )


def _kind_of_stage(part: Any) -> str | None:
    return next((kind for kind in STAGE_KINDS if not _lacking(kind, part)), None)


def _from_mapping(kind: str, value: Mapping[str, Any]) -> Any:
    if UNREGISTERED in value:
        raise SpecError(
            f"{spell_kind(kind)}: this spec holds {value[UNREGISTERED]!r}, not registered when it "
            "was written; name it in a plugin (registry.part) and write the spec again"
        )
    values = {str(key): item for key, item in value.items() if key != "name"}
    name = value.get("name", COMPOSED if kind == "inverse_hessian" else None)
    if not isinstance(name, str):
        raise SpecError(
            f"{spell_kind(kind)}: {dict(value)!r} has no name; write {{'name': ..., fields}}; "
            f"{nearest('', default_registry().names(kind))}"
        )
    registry = default_registry()
    cls = registry.resolve(kind, name)
    own = fields.public_fields(cls) if isinstance(cls, type) else {}
    if not any(fields.held_kind(fields.hints(cls).get(a.name)) for a in own.values()):
        return registry.make_with(kind, name, values, build_part)
    mine = {key: item for key, item in values.items() if key in own}
    rest = {key: item for key, item in values.items() if key not in own}
    part = registry.make_with(kind, name, mine, build_part)
    return _override({"": part}, rest, f"{spell_kind(kind)} {name!r}")[""]


def _conforming(kind: str, part: Any) -> Any:
    protocol = PROTOCOLS.get(kind)
    if protocol is None:
        return part
    if isinstance(part, type):
        raise SpecError(
            f"{spell_kind(kind)}: got the class {part.__name__}; give a value of it: call it"
        )
    lacking = _lacking(kind, part)
    if lacking:
        raise SpecError(
            f"{spell_kind(kind)}: got {part!r} ({type(part).__name__}), which has no "
            f"{', '.join(lacking)}; give a name, {{'name': ..., fields}} or a part that answers "
            f"dattri_core.{protocol.__name__}"
        )
    require_words(kind, part)
    return part


def _lacking(kind: str, part: Any) -> list[str]:
    wanted = [name for name in dir(PROTOCOLS[kind]) if not name.startswith("_")]
    return [name for name in wanted if not hasattr(part, name)]


# --- parts to data --------------------------------------------------------------------------------
def describe_part(part: Any) -> Any:
    """Return a part as plain data: its name, or ``{"name": ..., changed fields}``.

    A part that no plugin registered is ``{"unregistered": "module:Class", changed fields}``: enough
    to tell results apart, refused when read back.
    """
    named = default_registry().name_of(part)
    data = describe.plain_fields(part, describe_nested) if attrs.has(type(part)) else {}
    if named is None:
        cls = type(part)
        return {UNREGISTERED: f"{cls.__module__}:{cls.__qualname__}", **data}
    if named == ("inverse_hessian", COMPOSED):
        return data
    return {"name": named[1], **data} if data else named[1]


def describe_nested(value: Any) -> Any:
    """Return a part inside another value as plain data, None for what is no part."""
    is_part = default_registry().name_of(value) is not None or any(
        not _lacking(kind, value) for kind in PROTOCOLS
    )
    return describe_part(value) if attrs.has(type(value)) and is_part else None


def slots_of(method: Any) -> dict[str, Any]:
    """Return the parts of a method by slot, as they are."""
    return {slot: getattr(method, slot) for slot in SLOTS}


def describe_method(method: Any) -> dict[str, Any]:
    """Return a method as plain data; every slot is written, so that no default is hidden."""
    slots = slots_of(method)
    stages = slots.pop("stages")
    seed = slots.pop("seed")
    if stages is not None:
        for kind in STAGE_KINDS:
            del slots[kind]
    data = {slot: describe_part(part) for slot, part in slots.items()}
    if stages is not None:
        data["stages"] = [{str(_kind_of_stage(part)): describe_part(part)} for part in stages]
    return {**data, "seed": seed}


def describe_front(method: Any) -> dict[str, Any]:
    """Return the source and the projectors that a method begins with, as plain data."""
    parts = map(describe_part, itertools.takewhile(_is_projector, method.chain))
    identity = describe_part(build_part("projector", "identity"))
    return {
        "source": describe_part(method.source),
        "projectors": [part for part in parts if part != identity],
    }


def _is_projector(stage: Any) -> bool:
    return _kind_of_stage(stage) == "projector"


def name_of(part: Any) -> str:
    """Return how messages call a part: its registered name, or that of its class."""
    named = default_registry().name_of(part)
    return named[1] if named else type(part).__name__


def who_provides(kind: str, wanted: Iterable[str]) -> str:
    """Return which registered parts of a kind provide all of the wanted facts, as a hint."""
    registry, found = default_registry(), []
    for name in registry.names(kind):
        # One that is broken, or that has fields without a default, is no hint but no error either.
        with suppress(DattriError):
            if set(wanted) <= registry.make(kind, name).provides:
                found.append(name)
    return f"these do: {', '.join(found)}" if found else f"no registered {spell_kind(kind)} does"


# --- recipes and overrides ------------------------------------------------------------------------
def method_spec(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a registered method by slot, overrides applied.

    Raises:
        SpecError: No such method or field, or a field that several parts have.
    """
    return override(default_registry().recipe(name).spec, overrides, f"method {name!r}")


def override(
    spec: Mapping[str, Any], overrides: Mapping[str, Any], label: str = "method"
) -> dict[str, Any]:
    """Return the parts of a method by slot, some of them or their fields replaced.

    Slots are replaced first, then parts inside parts (``solver="cg"``), then fields. A field is
    found by its name alone when one part has it, else by more of its path: ``"solver.damping"``.

    Args:
        spec: Slots to parts, names or mappings.
        overrides: Slot or field to its new value.
        label: What messages call the method.

    Raises:
        SpecError: No such slot or field, or one that several parts have; the spellings are listed.
    """
    parts = build_slots(spec, label)
    made_of_parts = "attributor" not in parts
    slots = [key for key in overrides if key in (SLOTS if made_of_parts else parts)]
    for key in overrides:
        if not made_of_parts and key in DEFAULTS and key not in _fields_of(parts["attributor"]):
            raise SpecError(f"{label}: is not made of parts and has no slot {key!r}")
        if key in slots and key not in parts:
            raise SpecError(
                f"{label}: has no slot {key!r}, since it spells its stages; replace stages=[...]"
            )
    parts |= {slot: build_slot(slot, overrides[slot]) for slot in slots}
    if overrides.get("stages") is not None:
        for kind in STAGE_KINDS:
            if kind not in overrides:
                parts.pop(kind, None)
    rest = {key: value for key, value in overrides.items() if key not in slots}
    return _override(parts, rest, label)


def _fields_of(part: Any) -> Mapping[str, Any]:
    return fields.public_fields(type(part))


def build_slots(spec: Mapping[str, Any], label: str = "method") -> dict[str, Any]:
    """Return the part of every slot; slots that the spec leaves out take their default.

    Raises:
        SpecError: A slot is misspelt, or a part cannot be made.
    """
    valid = ("attributor",) if "attributor" in spec else SLOTS
    for slot in spec:
        if slot not in valid:
            raise SpecError(f"{label}: no slot {slot!r}; {nearest(str(slot), valid)}")
    if "attributor" in spec:
        return {"attributor": build_part("attributor", spec["attributor"])}
    stages = spec.get("stages")
    defaults = {k: v for k, v in DEFAULTS.items() if stages is None or k not in STAGE_KINDS}
    filled = {**defaults, "stages": None, "seed": 0, **spec}
    return {slot: build_slot(slot, filled[slot]) for slot in SLOTS if slot in filled}


def build_slot(slot: str, value: Any) -> Any:
    """Return what a slot holds: a part, the stages, or the seed."""
    if slot == "seed":
        if isinstance(value, bool) or not isinstance(value, int):
            raise SpecError(f"method: seed got {value!r} ({type(value).__name__}), expected int")
        return value
    if slot == "stages":
        return None if value is None else build_stages(value)
    return build_part(slot, value)


def _override(parts: dict[str, Any], overrides: Mapping[str, Any], label: str) -> dict[str, Any]:
    parts = dict(parts)
    waiting = dict(overrides)
    # A part inside a part is replaced before fields are sought: the field may be the new part's.
    for wants_part in (True, False):
        for key in list(waiting):
            found = _nearest(parts, key)
            if any(holds for _, holds in found) is not wants_part:
                continue
            if len(found) > 1:
                spellings = ", ".join(repr(_dotted(path)) for path, _ in found)
                raise SpecError(
                    f"{label}: several parts have a field {key!r}; write one of {spellings}"
                )
            if found:
                parts = _replace(parts, found[0][0], waiting.pop(key))
    for key in waiting:
        valid = {_dotted(path) for path, *_ in _paths(parts)}
        bare = {path[-1] for path, *_ in _paths(parts)}
        slots = {slot for slot in parts if slot}
        guess = nearest(key, valid | bare | slots).split("valid:")[0]
        raise SpecError(
            f"{label}: no slot and no part's field {key!r}; {guess}"
            f"valid: {', '.join([*sorted(slots), *sorted(valid)]) or '(none)'}"
        )
    return parts


def _nearest(parts: Mapping[str, Any], key: str) -> list[tuple[Path, bool]]:
    """Return the fields of a name; those of a stage inside a stage only where no other has it.

    ``damping`` means ``solver.damping``, not ``preconditioner.solver.damping``. Where no path ends
    with a name of several words, words in between may be missing: ``inverse_hessian.damping``.
    """
    found = [(p, holds, nested) for p, holds, nested in _paths(parts) if _ends_with(p, key)]
    if not found:
        found = [(p, holds, nested) for p, holds, nested in _paths(parts) if _leads_to(p, key)]
    least = min((nested for *_, nested in found), default=0)
    return [(path, holds) for path, holds, nested in found if nested == least]


def _paths(parts: Mapping[str, Any]) -> Iterator[tuple[Path, bool, int]]:
    """Yield the path of every field of every part, whether it holds parts, and its depth.

    The depth counts stages inside stages.
    """
    for slot, part in parts.items():
        yield from _paths_in(part, (slot,) if slot else (), 0)


def _paths_in(part: Any, prefix: Path, nested: int) -> Iterator[tuple[Path, bool, int]]:
    if isinstance(part, tuple):
        for position, item in enumerate(part):
            yield from _paths_in(item, (*prefix, str(position)), nested)
        return
    cls: Any = type(part)
    for name, attribute in fields.public_fields(cls).items():
        annotation = fields.hints(cls).get(attribute.name)
        held = fields.held_kind(annotation)
        yield (*prefix, name), held is not None, nested
        if held is not None:
            depth = nested + (held in STAGE_KINDS)
            yield from _paths_in(getattr(part, attribute.name), (*prefix, name), depth)


def _replace(parts: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    slot, rest = (path[0], path[1:]) if path[0] in parts else ("", path)
    return {**parts, slot: _replaced(parts[slot], rest, value)}


def _replaced(part: Any, path: Path, value: Any) -> Any:
    head, rest = path[0], path[1:]
    if isinstance(part, Sequence):
        position = int(head)
        return (*part[:position], _replaced(part[position], rest, value), *part[position + 1 :])
    cls: Any = type(part)
    label = f"part {name_of(part)!r}"
    if rest:
        attribute = fields.public_fields(cls)[head]
        new = _replaced(getattr(part, attribute.name), rest, value)
    else:
        new = fields.coerce(cls, head, value, label, build_part)
    return fields.construct(lambda: attrs.evolve(part, **{head: new}), label)


def _ends_with(path: Path, key: str) -> bool:
    words = tuple(key.split("."))
    return path[-len(words) :] == words


def _leads_to(path: Path, key: str) -> bool:
    """Return whether the words of a key are in a path in order, first and last at its ends."""
    words = key.split(".")
    rest = iter(path)
    ends = len(words) > 1 and (path[0], path[-1]) == (words[0], words[-1])
    return ends and all(word in rest for word in words)


def _dotted(path: Path) -> str:
    return ".".join(path)
