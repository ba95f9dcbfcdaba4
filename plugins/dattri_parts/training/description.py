"""What a value does, as words and tensors: the code of its classes and functions, what they hold.

Two values with the same description compute the same. A function counts by its source where that is
proven to be what runs, and elsewhere, as in a source file that was edited since it was imported, by
its instructions, which are others under each version of Python. So edited files, notebooks and
redefined classes are all told apart; comments and line numbers are not.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from attrs import define, field
from torch import Tensor, nn

from dattri_parts.training.members import is_code, members_of
from dattri_parts.training.source import source_of

NAMED = (
    frozenset({"torch", "numpy", "attr", "attrs", "dattri_core", "dattri_parts"})
    | sys.stdlib_module_names
)
"""Packages whose code counts by its name alone: their versions move outcomes by rounding only."""
MAIN = frozenset({"__main__", "__mp_main__"})
INSTALLED = frozenset({"site-packages", "dist-packages"})
SPELLED = frozenset(
    {"datetime", "decimal", "fractions", "operator", "pathlib", "re", "uuid", "torch"}
)
"""Modules whose small values say all that they hold in their text."""
NAMESPACES = frozenset({"types", "argparse", "functools"})
"""Modules of the standard library whose objects hold what was given to them."""
PLAIN = (type(None), bool, int, float, str)
VOLATILE = frozenset({"training", "_torchdynamo_wrapper_id", "_original_object_hash"})
"""Attributes that decide no number: the mode, which is set, an address, a hash of the process."""
LOADS = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
BETWEEN = frozenset({"CACHE", "EXTENDED_ARG", "PUSH_NULL"})
"""Instructions that may stand between a module and what is read of it."""


@define(eq=False)
class Description:
    """Describes values one after another, each object once.

    Classes and functions of the user are followed wherever they lead: bases, defaults, closures,
    and the globals that they read. Those of installed packages count by their own code and the
    version of the package, those of `NAMED` by their names.
    """

    tensors: list[Tensor] = field(factory=list, init=False)
    _seen: dict[int, int] = field(factory=dict, init=False)
    _kept: list[Any] = field(factory=list, init=False)  # so that no id is given out again

    def of(self, value: Any) -> Any:
        """Return what a value is and does, JSON-ready; its tensors are added to ``tensors``."""
        if type(value) in PLAIN:
            return value
        if isinstance(value, tuple):
            return ["tuple", self._kind(value), *map(self.of, value)]
        if isinstance(value, (bytes, bytearray, complex, range, slice, type(...))):
            return [type(value).__name__, repr(value)]
        if isinstance(value, CodeType):
            return self._code(value)
        if id(value) in self._seen:
            return ["seen", self._seen[id(value)]]
        self._seen[id(value)] = len(self._kept)
        self._kept.append(value)
        return self._once(value)

    def _once(self, value: Any) -> Any:
        match value:
            case Tensor():
                self.tensors.append(value.detach())
                position = len(self.tensors) - 1
                return ["tensor", self._kind(value), position, value.requires_grad]
            case torch.Generator() | np.random.Generator() | np.random.RandomState() | Random():
                return ["generator", self.of(_state(value))]
            case enum.Enum():
                return ["enum", self.of(type(value)), value.name, self.of(value.value)]
            case list() | deque():
                return ["list", self._kind(value), *map(self.of, value)]
            case set() | frozenset():  # others than constants come in the order of their addresses
                plain = all(map(_is_constant, value))
                return ["set", len(value), *(sorted(map(repr, value)) if plain else ())]
            case Mapping():
                pairs = [[self.of(key), self.of(item)] for key, item in value.items()]
                return ["mapping", self._kind(value), *pairs]
            case np.ndarray() | np.generic():
                return self._array(np.asarray(value))
            case type():
                return self._class(value)
            case ModuleType():
                return ["module", value.__name__]
            case _:
                return self._callable(value) or self._object(value)

    # --- code ---------------------------------------------------------------------------------
    def _callable(self, value: Any) -> Any:
        """Return the description of a function and its like; None for another object."""
        match value:
            case FunctionType():
                return self._function(value)
            case MethodType():
                return ["method", self.of(value.__func__), self.of(value.__self__)]
            case functools.partial():
                return ["partial", *map(self.of, (value.func, value.args, value.keywords))]
            case functools.partialmethod() if type(value) is functools.partialmethod:
                return ["method", *map(self.of, (value.func, value.args, value.keywords))]
            case functools.cached_property() if type(value) is functools.cached_property:
                return ["property", self.of(value.func)]
            case staticmethod() | classmethod():
                return [type(value).__name__, self.of(value.__func__)]
            case property():
                return ["property", *map(self.of, (value.fget, value.fset, value.fdel))]
            case BuiltinFunctionType():
                owner = value.__self__
                held = isinstance(owner, (ModuleType, type)) or owner is None
                of = _name_of(owner) if held else self.of(owner)
                return ["builtin", of, value.__qualname__]
            case torch.jit.ScriptModule() | torch.jit.ScriptFunction():
                return self._script(value)
            case _:
                return None

    def _function(self, function: FunctionType) -> Any:
        name = function.__globals__.get("__name__", function.__module__)
        cells = function.__closure__ or ()
        held = dict(zip(function.__code__.co_freevars, map(_content, cells), strict=True))
        closure = [[key, self.of(item)] for key, item in sorted(held.items())]
        if _is_named(name):  # a decorator of torch still holds what it decorates
            return ["function", name, function.__qualname__, closure]
        source = source_of(function)
        if source is None:
            code, found = self._code(function.__code__), _globals_read(function.__code__, function)
        else:
            code, found = ["source", __debug__, source.digest], _looked_up(source.reads, function)
        read = {} if _is_installed(name) else dict(found)
        return [
            "function",
            _version(name),
            code,
            self.of(function.__defaults__),
            self.of(function.__kwdefaults__),
            closure,
            [[key, self.of(item)] for key, item in sorted(read.items())],
            [[k, self.of(v)] for k, v in sorted(vars(function).items()) if k != "__wrapped__"],
        ]

    def _code(self, code: CodeType) -> Any:
        return [
            "code",
            [sys.implementation.name, *sys.version_info[:2]],
            code.co_code.hex(),
            getattr(code, "co_exceptiontable", b"").hex(),
            code.co_flags,
            [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount],
            list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]),
            [list(code.co_names), list(code.co_freevars), list(code.co_cellvars)],
            [self.of(constant) for constant in code.co_consts],
        ]

    def _kind(self, value: Any) -> Any:
        """Return the description of a container's class, and of what it holds beside its items."""
        kind = type(value)
        if _is_named(kind.__module__):
            return self._name(kind)
        return [self.of(kind), self._held(value)]

    def _class(self, given: type) -> Any:
        name = self._name(given)
        if _is_named(given.__module__):
            return ["class", name]
        installed = _is_installed(given.__module__)
        members = [
            [key, self.of(member)]
            for key, member in members_of(given)
            if not installed or is_code(member) or type(member) in PLAIN
        ]
        bases = [self.of(base) for base in given.__bases__]
        return ["class", name, _version(given.__module__), bases, members]

    def _name(self, given: type) -> str:
        """Return the name of a class; those of the user have no module, which pickling changes."""
        module = given.__module__
        if not _is_named(module) and not _is_installed(module):
            return given.__qualname__
        package = module.partition(".")[0]
        if package in sys.stdlib_module_names:  # its parts move from version to version
            module = package.lstrip("_")
        return f"{module}.{given.__qualname__}"

    def _script(self, value: Any) -> Any:
        if isinstance(value, torch.jit.ScriptFunction):
            return ["script", value.code]
        codes = [[name, getattr(m, "code", None)] for name, m in value.named_modules()]
        tensors = {**dict(value.named_parameters()), **dict(value.named_buffers())}
        return ["script", codes, self.of(tensors)]

    # --- what objects hold --------------------------------------------------------------------
    def _object(self, value: Any) -> Any:
        kind = type(value)
        package = kind.__module__.partition(".")[0]
        words = ["object", self.of(kind), _name_of(value)]
        words += [base.__repr__(value) for base in (int, float, str) if isinstance(value, base)]
        if isinstance(value, nn.Module):
            return [*words, self._held(value)]
        if package in SPELLED and not hasattr(value, "__dict__"):
            return [*words, repr(value)]
        if "__wrapped__" in getattr(value, "__dict__", {}):  # a function with a cache
            return [*words, self.of(value.__wrapped__)]
        opaque = package in sys.stdlib_module_names and package not in NAMESPACES
        if opaque or kind.__module__.startswith("torch._"):  # locks, loggers, compilers
            return words
        return [*words, self._held(value)]

    def _held(self, value: Any) -> list[Any]:
        """Return names and values of the attributes of an object; hooks without their numbers."""
        held = dict(getattr(value, "__dict__", {}))
        for kind in type(value).__mro__:
            for name, slot in vars(kind).items():
                if isinstance(slot, MemberDescriptorType):
                    with suppress(AttributeError):  # never set
                        held[name] = slot.__get__(value)
        held = {name: item for name, item in held.items() if name not in VOLATILE}
        if isinstance(value, nn.Module):
            for name, item in held.items():
                if name.startswith("_") and "_hooks" in name and isinstance(item, dict):
                    held[name] = list(item.values())
        return [[name, self.of(item)] for name, item in sorted(held.items())]

    def _array(self, array: np.ndarray[Any, Any]) -> Any:
        if array.dtype.hasobject:
            return ["array", list(array.shape), *map(self.of, array.ravel().tolist())]
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return ["array", array.dtype.str, list(array.shape), digest]


def _is_named(module: str | None) -> bool:
    return module is None or module.partition(".")[0] in NAMED


def _is_installed(module: str | None) -> bool:
    """Return whether a module is one of an installed package, which nobody edits in passing."""
    if module is None or module in MAIN:
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and not INSTALLED.isdisjoint(Path(file).parts)


def _version(module: str) -> str | None:
    if not _is_installed(module):
        return None
    found = getattr(sys.modules.get(module.partition(".")[0]), "__version__", None)
    return None if found is None else str(found)


def _is_constant(value: Any) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_constant, value))
    return type(value) in PLAIN or isinstance(value, (bytes, complex))


def _name_of(value: Any) -> str | None:
    name = getattr(value, "__qualname__", getattr(value, "__name__", None))
    return name if isinstance(name, str) else None


def _state(generator: Any) -> Any:
    """Return where a generator of random numbers stands."""
    if isinstance(generator, Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.bit_generator.state


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty cell"


def _looked_up(names: list[list[str]], function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the globals that source reads, by name; of a user's module, what is read of it."""
    for name, *attributes in names:
        if name in function.__globals__:
            value = function.__globals__[name]
            for attribute in attributes:
                if not isinstance(value, ModuleType) or _is_named(value.__name__):
                    break
                if not hasattr(value, attribute):
                    break
                name, value = f"{name}.{attribute}", getattr(value, attribute)
            yield name, value


def _globals_read(code: CodeType, function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the globals that code without a source reads, in the same way."""
    known = function.__globals__
    steps = [step for step in dis.get_instructions(code) if step.opname not in BETWEEN]
    for position, step in enumerate(steps):
        if step.opname not in LOADS or step.argval not in known:
            continue
        name, value = step.argval, known[step.argval]
        for after in steps[position + 1 :]:
            if not isinstance(value, ModuleType) or _is_named(value.__name__):
                break
            if after.opname not in ATTRIBUTES or not hasattr(value, after.argval):
                break
            name, value = f"{name}.{after.argval}", getattr(value, after.argval)
        yield name, value
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_read(constant, function)
