"""What the source of a function says, the same under every version of Python that reads it.

Trees are written out by the names of their nodes and of the fields that hold something. Versions
add fields, which are empty for code that does not use them, print trees in other ways, and compile
them to other instructions: none of that is seen here.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

Function: TypeAlias = "ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
UNSEEN = frozenset({"ctx", "kind", "type_comment", "type_ignores"})
"""Fields that change nothing of what runs."""
ANNOTATIONS = frozenset({"annotation", "returns", "type_params"})


# --- what it says -----------------------------------------------------------------------------
def digest(function: Function, private: str | None = None) -> str:
    """Return a hash of what a function does when it is called.

    Comments, layout and docstrings are no part of it, and neither are its name, its decorators, its
    defaults and its own annotations, which are evaluated where it is defined.

    Args:
        function: Its node.
        private: Name of the class whose body it stands in, which Python puts before private names.
    """
    known = function.args
    words = [
        type(function).__name__,
        [[arg.arg for arg in args] for args in (known.posonlyargs, known.args, known.kwonlyargs)],
        [None if arg is None else arg.arg for arg in (known.vararg, known.kwarg)],
        _words(_body(function)),
        private if any(map(_is_private, _names(function))) else None,
    ]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _words(value: Any) -> Any:
    """Return a tree, or what a field holds, JSON-ready."""
    match value:
        case ast.Constant():
            return ["Constant", *_constant(value.value)]
        case ast.MatchSingleton():
            return ["MatchSingleton", *_constant(value.value)]
        case ast.JoinedStr():
            return ["JoinedStr", *map(_words, _pieces(value))]
        case ast.AST():
            held = [(n, _field(value, n)) for n in value._fields if n not in UNSEEN]
            return [type(value).__name__, *([n, _words(v)] for n, v in held if v not in (None, []))]
        case list():
            return ["list", *map(_words, value)]
        case _:
            return value


def _field(node: ast.AST, name: str) -> Any:
    value = getattr(node, name, None)
    if name == "body" and isinstance(node, DEFINITIONS):
        return _body(node)
    empty = name == "format_spec" and isinstance(value, ast.JoinedStr) and not _pieces(value)
    return None if empty else value


def _constant(value: Any) -> list[str]:
    """Return a constant in words; a number of any length."""
    return [type(value).__name__, hex(value) if type(value) is int else repr(value)]


def _pieces(text: ast.JoinedStr) -> list[ast.expr]:
    """Return the parts of a formatted text; versions cut the constant ones in other places."""
    found: list[ast.expr] = []
    for part in text.values:
        for piece in _pieces(part) if isinstance(part, ast.JoinedStr) else [part]:
            last = found[-1] if found else None
            if isinstance(piece, ast.Constant) and isinstance(last, ast.Constant):
                found[-1] = ast.Constant(str(last.value) + str(piece.value))
            elif not isinstance(piece, ast.Constant) or piece.value != "":
                found.append(piece)
    return found


def _body(node: Any) -> Any:
    """Return what a function or class runs, without its docstring."""
    match node.body:
        case [ast.Expr(ast.Constant(str())), *others]:
            return others
        case body:
            return body


def _names(node: ast.AST) -> Iterator[str]:
    """Yield every name in a tree."""
    for each in ast.walk(node):
        for name in each._fields:
            held = getattr(each, name, None)
            if not isinstance(each, ast.Constant):
                given = held if isinstance(held, list) else [held]
                yield from (value for value in given if isinstance(value, str))


def _is_private(name: str) -> bool:
    return name.startswith("__") and not name.endswith("__")


# --- what it reads ----------------------------------------------------------------------------
class Scope(NamedTuple):
    """Names of a function, class or comprehension."""

    kind: type[ast.AST]
    bound: frozenset[str]
    declared: frozenset[str]  # global


def reads(function: Function, free: tuple[str, ...], private: str | None = None) -> list[list[str]]:
    """Return the names that a function looks up among its globals and builtins when it is called.

    Each with the attributes that are read of it, ``["module", "sub", "function"]``; sorted. Those
    of annotations are left out: versions evaluate them at different times.

    Args:
        function: Its node.
        free: Names that it takes from functions around it.
        private: See `digest`.
    """
    outer = Scope(ast.Lambda, frozenset(free), frozenset())
    body = _body(function)
    found = _inside(function, body if isinstance(body, list) else [body], (outer,), private)
    return sorted(map(list, set(found)))


Reads: TypeAlias = "Iterator[tuple[str, ...]]"


def _reads(node: ast.AST, scopes: tuple[Scope, ...], private: str | None) -> Reads:
    chain = _chain(node, private)
    if chain:
        if _is_global(chain[0], scopes):
            yield chain
        return
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        loaded = ast.Name(node.target.id, ast.Load())  # it is read before it is set
        yield from _reads(loaded, scopes, private)
    inner: list[ast.AST] = []
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            inner = [*node.body]
        case ast.Lambda():
            inner = [node.body]
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            first = node.generators[0]
            inner = [n for n in _children(node) if n is not first]
            inner += [first.target, *first.ifs]
    for child in _here(node):
        yield from _reads(child, scopes, private)
    yield from _inside(node, inner, scopes, private)


def _inside(
    node: ast.AST, inner: list[ast.AST], scopes: tuple[Scope, ...], private: str | None
) -> Reads:
    """Yield what is read in the scope that a node opens."""
    if not inner:
        return
    name = node.name if isinstance(node, ast.ClassDef) else private
    bound, declared, elsewhere = _bound(node, inner)
    own = Scope(type(node), frozenset(bound - declared - elsewhere), frozenset(declared))
    for child in inner:
        yield from _reads(child, (*scopes, own), name)


def _chain(node: ast.AST, private: str | None) -> tuple[str, ...]:
    """Return the name that is read and attributes of it; nothing for another node."""
    names: list[str] = []
    while isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        names.append(_mangled(node.attr, private))
        node = node.value
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return (_mangled(node.id, private), *reversed(names))
    return ()


def _mangled(name: str, private: str | None) -> str:
    before = (private or "").lstrip("_")
    return f"_{before}{name}" if before and _is_private(name) else name


def _is_global(name: str, scopes: tuple[Scope, ...]) -> bool:
    for scope in reversed(scopes):
        if name in scope.declared:
            return True
        if scope.kind is ast.ClassDef:  # its functions do not see its names
            if scope is scopes[-1] and name in scope.bound:
                return True  # where it is not set yet
        elif name in scope.bound:
            return False
    return True


def _bound(node: ast.AST, inner: list[ast.AST]) -> tuple[set[str], set[str], set[str]]:
    """Return the names that a scope binds, and those that it says are global or nonlocal."""
    bound = {each.name for each in getattr(node, "type_params", [])}
    declared: set[str] = set()
    elsewhere: set[str] = set()
    if isinstance(node, FUNCTIONS):
        bound |= {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)}
    waiting = list(inner)
    while waiting:
        each = waiting.pop()
        waiting += _here(each)
        match each:
            case ast.Name(ctx=ast.Store() | ast.Del()):
                bound.add(each.id)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                bound.add(each.name)
            case ast.alias():
                bound.add(each.asname or each.name.partition(".")[0])
            case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar():
                bound.add(each.name or "")
            case ast.MatchMapping():
                bound.add(each.rest or "")
            case ast.Global():
                declared.update(each.names)
            case ast.Nonlocal():
                elsewhere.update(each.names)
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                if not isinstance(node, COMPREHENSIONS):
                    bound |= set(_assigned(each))
    if isinstance(node, COMPREHENSIONS):
        bound -= set(_assigned(node))
    return bound, declared, elsewhere


def _assigned(node: ast.AST) -> Iterator[str]:
    """Yield names that ``:=`` binds around a comprehension."""
    if isinstance(node, ast.NamedExpr):
        yield node.target.id
    if not isinstance(node, ast.Lambda):
        for child in _children(node):
            yield from _assigned(child)


def _here(node: ast.AST) -> list[ast.AST]:
    """Return the parts of a node that are evaluated in the scope where it stands."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return [*node.decorator_list, *_defaults(node)]
        case ast.Lambda():
            return [*_defaults(node)]
        case ast.ClassDef():
            return [*node.decorator_list, *node.bases, *node.keywords]
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            return [node.generators[0].iter]
        case _:
            return _children(node)


def _defaults(node: Function) -> list[ast.expr]:
    return [each for each in (*node.args.defaults, *node.args.kw_defaults) if each is not None]


def _children(node: ast.AST) -> list[ast.AST]:
    """Return the nodes below a node, without annotations."""
    found: list[ast.AST] = []
    for name in node._fields:
        held = getattr(node, name, None)
        if name not in ANNOTATIONS:
            given = held if isinstance(held, list) else [held]
            found += [value for value in given if isinstance(value, ast.AST)]
    return found
