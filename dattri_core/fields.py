"""Fields of parts: plain data to checked values, by the annotations of attrs classes."""

from __future__ import annotations

import collections.abc
import functools
import sys
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union

import attrs

from dattri_core.errors import SpecError, nearest

PROTOCOL_KINDS = {
    "Source": "source",
    "Projector": "projector",
    "InverseHessian": "inverse_hessian",
    "Curvature": "curvature",
    "Solver": "solver",
    "Scorer": "scorer",
    "Fold": "fold",
    "Attributor": "attributor",
}
"""Protocol of `dattri_core.protocols` -> the kind of part that a field so annotated takes."""

BuildPart = Callable[[str, Any], Any]


class MismatchError(Exception):
    """A value that an annotation does not admit."""


def public_fields(cls: type) -> dict[str, attrs.Attribute[Any]]:
    """Return the fields that may be given, by the names under which they are given."""
    if not attrs.has(cls):
        return {}
    return {a.alias or a.name: a for a in attrs.fields(cls) if a.init}


def part_kind(annotation: Any) -> str | None:
    """Return the kind of part that an annotation asks for, or None for plain values."""
    if getattr(annotation, "__module__", "") == "dattri_core.protocols":
        return PROTOCOL_KINDS.get(getattr(annotation, "__name__", ""))
    kinds = {part_kind(choice) for choice in _alternatives(annotation)} - {None}
    return kinds.pop() if len(kinds) == 1 else None


def held_kind(annotation: Any) -> str | None:
    """Return the kind of the part, or of the parts of a tuple, that a field so annotated holds."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple and arguments[-1:] == (Ellipsis,):
        return part_kind(arguments[0])
    return part_kind(annotation)


def build(cls: type, given: Mapping[str, Any], label: str, build_part: BuildPart) -> Any:
    """Return ``cls(**given)`` with every field named and typed as declared.

    Raises:
        SpecError: A field is misspelt, missing, of a wrong type, or refused by the class.
    """
    fields = public_fields(cls)
    _require_known(given, fields, label)
    missing = [n for n, a in fields.items() if a.default is attrs.NOTHING and n not in given]
    if missing:
        raise SpecError(f"{label}: needs a value for {', '.join(map(repr, missing))}")
    checked = {name: coerce(cls, name, value, label, build_part) for name, value in given.items()}
    return construct(lambda: cls(**checked), label)


def changed(part: Any, given: Mapping[str, Any], label: str, build_part: BuildPart) -> Any:
    """Return a part with fields replaced, each named and typed as its class declares.

    Raises:
        SpecError: A field is misspelt, of a wrong type, or refused by the class.
    """
    cls = type(part)
    _require_known(given, public_fields(cls), label)
    checked = {name: coerce(cls, name, value, label, build_part) for name, value in given.items()}
    return construct(lambda: attrs.evolve(part, **checked), label)


def _require_known(given: Mapping[str, Any], fields: Mapping[str, Any], label: str) -> None:
    for name in given:
        if name not in fields:
            raise SpecError(f"{label}: no field {name!r}; {nearest(str(name), fields)}")


def construct(make: Callable[[], Any], label: str) -> Any:
    """Return ``make()``; a refusal by a converter or validator names the part."""
    try:
        return make()
    except SpecError:
        raise
    except (TypeError, ValueError) as error:
        raise SpecError(f"{label}: {error.args[0] if error.args else error}") from error


def coerce(cls: type, name: str, value: Any, label: str, build_part: BuildPart) -> Any:
    """Return the value as the field wants it.

    Raises:
        SpecError: It is of a wrong type; names part, field, what was got and what is expected.
    """
    attribute = public_fields(cls)[name]
    annotation = hints(cls).get(attribute.name, Any)
    kind = part_kind(annotation)
    if kind is not None and not (value is None and type(None) in _alternatives(annotation)):
        return build_part(kind, value)
    try:
        return admit(value, annotation, build_part)
    except (MismatchError, SpecError) as error:
        if attribute.converter is not None:
            # The converter takes more than the field holds: its own refusal is reported.
            _check_converted(cls, attribute, annotation, value, label, build_part)
            return value
        if isinstance(error, SpecError):
            raise
        raise SpecError(
            f"{label}: field {name!r} got {value!r} ({type(value).__name__}), "
            f"expected {spell(annotation)}"
        ) from None


def _check_converted(
    cls: type,
    attribute: attrs.Attribute[Any],
    annotation: Any,
    value: Any,
    label: str,
    build_part: BuildPart,
) -> None:
    where = f"{label}: field {attribute.alias or attribute.name!r} got {value!r}"
    expected = f"expected {spell(annotation)} or what converts to it"
    try:
        converted = convert(attribute, value)
        admit(converted, annotation, build_part)
    except (MismatchError, TypeError, ValueError) as error:
        reason = f" ({error.args[0]})" if error.args else ""
        raise SpecError(f"{where} ({type(value).__name__}), {expected}{reason}") from error


def convert(attribute: attrs.Attribute[Any], value: Any) -> Any:
    """Return the value after the field's own converter, if it has one."""
    converter = attribute.converter
    return value if converter is None else typing.cast("Callable[[Any], Any]", converter)(value)


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Return the annotations of a class; `Any` for one whose names exist for type checkers only."""
    try:
        return typing.get_type_hints(cls)
    except NameError:
        namespace = vars(sys.modules[cls.__module__])
        return {a.name: _evaluate(a.type, namespace) for a in attrs.fields(cls)}


def _evaluate(annotation: Any, namespace: dict[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, namespace)
    except NameError:
        return Any


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return ()


def admit(value: Any, annotation: Any, build_part: BuildPart) -> Any:
    """Return the value as the annotation admits it: a list for a tuple, an integer for a float.

    Raises:
        Mismatch: It does not.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return admit(value, arguments[0], build_part)
    if origin is Literal:
        _require(any(type(value) is type(a) and value == a for a in arguments))
        return value
    if _alternatives(annotation):
        return _admit_any(value, arguments, build_part)
    if origin in (tuple, list, frozenset, set):
        return _admit_items(value, origin, arguments, build_part)
    if origin in (dict, collections.abc.Mapping):
        _require(isinstance(value, Mapping))
        key, item = arguments
        return {admit(k, key, build_part): admit(v, item, build_part) for k, v in value.items()}
    if origin is collections.abc.Callable:
        _require(callable(value))
        return value
    return _admit_plain(value, origin or annotation, build_part)


def _admit_any(value: Any, arguments: tuple[Any, ...], build_part: BuildPart) -> Any:
    if value is None and type(None) in arguments:
        return None
    admitted = []
    for choice in arguments:
        with suppress(MismatchError):
            admitted.append(admit(value, choice, build_part))
    _require(bool(admitted))
    # Of "int | float", 1 stays an integer: what needs no change comes first.
    return next((a for a in admitted if type(a) is type(value)), admitted[0])


def _admit_items(
    value: Any, origin: type, arguments: tuple[Any, ...], build_part: BuildPart
) -> Any:
    _require(isinstance(value, (list, tuple, frozenset, set)))
    if origin is tuple and arguments[-1:] != (Ellipsis,):
        _require(len(value) == len(arguments))
        return tuple(admit(v, a, build_part) for v, a in zip(value, arguments, strict=True))
    return origin(admit(item, arguments[0], build_part) for item in value)


def _admit_plain(value: Any, annotation: Any, build_part: BuildPart) -> Any:
    kind = part_kind(annotation)
    if kind is not None:
        return build_part(kind, value)
    if annotation is None or annotation is type(None):
        _require(value is None)
    elif annotation is bool:
        _require(isinstance(value, bool))
    elif annotation is int:
        _require(isinstance(value, Integral) and not isinstance(value, bool))
        return int(value)
    elif annotation is float:
        _require(isinstance(value, Real) and not isinstance(value, bool))
        return float(value)
    elif annotation is Path and isinstance(value, str):
        return Path(value)
    elif isinstance(annotation, type) and attrs.has(annotation) and isinstance(value, Mapping):
        return build(annotation, value, annotation.__name__, build_part)
    elif isinstance(annotation, type) and not getattr(annotation, "_is_protocol", False):
        _require(isinstance(value, annotation))
    return value


def _require(condition: bool) -> None:
    if not condition:
        raise MismatchError


def spell(annotation: Any) -> str:
    """Return an annotation as a reader would write it."""
    choices = _alternatives(annotation)
    if choices:
        return " or ".join(spell(choice) for choice in choices)
    if typing.get_origin(annotation) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(annotation)))}"
    if typing.get_origin(annotation) is tuple and held_kind(annotation) is not None:
        return f"list of {spell(typing.get_args(annotation)[0])}"
    if annotation is None or annotation is type(None):
        return "None"
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return annotation.__name__
    return str(annotation).replace("typing.", "")
