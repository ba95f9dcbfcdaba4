"""What of a class decides what it does: its members, less what Python and generators of code add.

Methods that dataclasses, attrs and named tuples write follow from the fields of a class, and are
other ones with each version of what writes them; so fields are given in their place.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

from typing_extensions import Protocol

BOOKKEEPING = frozenset(
    f"__{name}__"
    for name in (
        *("module", "doc", "dict", "weakref", "qualname", "annotations", "annotate", "hash"),
        *("firstlineno", "static_attributes", "orig_bases", "parameters", "abstractmethods"),
        *("slots", "match_args", "type_params", "dataclass_fields", "dataclass_params"),
        *("attrs_attrs", "attrs_props", "attrs_own_setattr", "annotate_func", "slotnames"),
        *("annotations_cache", "conditional_annotations", "protocol_attrs"),
        *("callable_proto_members_only", "non_callable_proto_members"),
    )
)
"""Of a class, what decides no number."""
GENERATED = "generated from the fields"
OF_ATTRS = frozenset(
    f"__{name}__"
    for name in (
        "init",
        "attrs_init",
        "repr",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "setattr",
        "replace",
    )
)
"""Others that attrs writes hold code of the user."""
OF_A_DATACLASS = ("default", "default_factory", "init", "hash", "compare", "kw_only", "metadata")
OF_A_FIELD = (
    *("default", "validator", "converter", "init", "kw_only", "alias", "on_setattr"),
    *("eq", "eq_key", "order", "order_key", "hash", "metadata"),
)
"""What attrs knows of a field, without how it is shown."""


def members_of(given: type) -> Iterator[tuple[str, Any]]:
    """Yield names and values of what a class defines, by name, and then its fields."""
    own = {key: value for key, value in vars(given).items() if key not in BOOKKEEPING}
    if _module(own.get("__subclasshook__")) == "typing":  # of protocols
        del own["__subclasshook__"]
    if _is_lent(given, own.get("__init__")):
        del own["__init__"]
    if issubclass(given, enum.Enum):
        yield from sorted((k, v) for k, v in own.items() if _is_written(given, k, v))
        yield "members", [[name, each.value] for name, each in given.__members__.items()]
        return
    for key, value in sorted(own.items(), key=lambda pair: pair[0]):
        if not _is_generated(given, key, value):
            yield key, value
        elif key != "__replace__":  # from Python 3.13 on
            yield key, GENERATED
    yield from _fields(given)


def _is_lent(given: type, init: Any) -> bool:
    """Return whether a class of a protocol got its ``__init__`` of a base when it was first made.

    Until then it has none of its own, and the protocol's puts it there.
    """
    bases = given.__mro__[1:]
    if Protocol not in bases or init is None:
        return False
    return any(init is vars(base).get("__init__") for base in bases)


def is_code(member: Any) -> bool:
    """Return whether a member of a class is a method or property."""
    return isinstance(member, (FunctionType, staticmethod, classmethod, property))


def _is_written(given: type[enum.Enum], key: str, value: Any) -> bool:
    """Return whether a user wrote a member of an enum that is none of its values."""
    if key in given.__members__:
        return False
    return _module(value) not in (None, "enum") if key.startswith("_") else True


def _is_generated(given: type, key: str, value: Any) -> bool:
    module, code = _module(value), getattr(_function(value), "__code__", None)
    if module is None or code is None:
        return False
    if "__dataclass_fields__" in vars(given):
        made = getattr(code, "co_qualname", "").startswith("__create_fn__.<locals>.")
        return made or module in ("dataclasses", "reprlib")
    if "__attrs_attrs__" in vars(given):
        own = module.startswith("attr.") and key != "__setattr__"  # that of frozen classes counts
        return key in OF_ATTRS and (own or code.co_filename.startswith("<attrs generated"))
    if "_fields" in vars(given) and issubclass(given, tuple):
        return module == "collections" or module == f"namedtuple_{given.__name__}"
    return False


def _fields(given: type) -> Iterator[tuple[str, Any]]:
    known = vars(given)
    if "__dataclass_fields__" in known:
        params = known.get("__dataclass_params__")
        words = ("init", "eq", "order", "unsafe_hash", "frozen")
        yield "fields", {name: getattr(params, name, None) for name in words}
        for each in known["__dataclass_fields__"].values():
            kind = each._field_type.name
            yield (
                each.name,
                {"kind": kind, **{word: getattr(each, word) for word in OF_A_DATACLASS}},
            )
    elif "__attrs_attrs__" in known:
        for each in known["__attrs_attrs__"]:
            yield each.name, {word: getattr(each, word) for word in OF_A_FIELD}


def _function(value: Any) -> Any:
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def _module(value: Any) -> str | None:
    """Return the name of the module whose globals a method sees; None where it is none."""
    function = _function(value)
    known: Mapping[str, Any] = getattr(function, "__globals__", {})
    name = known.get("__name__", getattr(function, "__module__", None))
    return str(name) if isinstance(function, FunctionType) else None
