"""The source of a function, where it can be had and is proven to be what runs.

It is compiled again, by the Python that runs: where the instructions, names and constants are those
of the function, source and function say the same. A file that was edited since it was imported, or
code that something rewrote, do not pass.
"""

from __future__ import annotations
import __future__

import ast
import linecache
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from attrs import field, frozen

from dattri_parts.training.syntax import FUNCTIONS, Function, digest, reads

FUTURES = 0
for _name in set(__future__.all_feature_names) - {"nested_scopes"}:  # whose flag has another sense
    FUTURES |= getattr(__future__, _name).compiler_flag
COMPARED = (
    *("co_code", "co_exceptiontable", "co_flags", "co_argcount", "co_posonlyargcount"),
    *("co_kwonlyargcount", "co_varnames", "co_names", "co_freevars", "co_cellvars"),
)
"""Of compiled code, what runs; not where it stands. Some of it is no part of its ``==``."""


@frozen
class Source:
    """What the source of a function says.

    Args:
        digest: A hash of what it does, see `syntax.digest`.
        reads: The globals and builtins that it looks up, see `syntax.reads`.
    """

    digest: str
    reads: list[list[str]]


@frozen(eq=False)
class _Node:
    """The definition of a function, and the name of the class that it stands in."""

    tree: Function
    private: str | None


@frozen(eq=False)
class _Place:
    """The functions of one name that begin in one line, and what they compile to."""

    nodes: list[_Node] = field(factory=list)
    codes: list[CodeType] = field(factory=list)


def source_of(function: FunctionType) -> Source | None:
    """Return what the source of a function says; None where none is proven to be what runs.

    Looked for in the file of its code by name and line, and by name alone where lines moved since
    it was read. Where several compile to the same it is taken only if they say the same.
    """
    code = function.__code__
    linecache.checkcache(code.co_filename)
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    with suppress(RecursionError):  # of thousands of levels
        node = _find(text, code) if text else None
        if node is not None:
            names = reads(node.tree, code.co_freevars, node.private)
            return Source(digest(node.tree, node.private), names)
    return None


def _find(text: str, code: CodeType) -> _Node | None:
    places = _written(text, code.co_flags & FUTURES).get(code.co_name, {})
    exact = places.get(code.co_firstlineno)
    for given in ([] if exact is None else [exact], places.values()):
        nodes = [
            node
            for place in given
            for other in place.codes
            if _same(code, other)
            for node in _innermost(place.nodes, other)
        ]
        if nodes:
            said = {digest(node.tree, node.private) for node in nodes}
            return nodes[0] if len(said) == 1 else None
    return None


def _innermost(nodes: list[_Node], code: CodeType) -> list[_Node]:
    """Return those of the functions of a line that code may be of: the smallest around it.

    Python 3.10 does not say where in a line code stands.
    """
    if len(nodes) == 1 or not hasattr(code, "co_positions"):
        return nodes
    known = [each for each in code.co_positions() if None not in each and each[2:] != (0, 0)]
    if not known:
        return nodes
    first = min((line, column) for line, _, column, _ in known)
    last = max((line, column) for _, line, _, column in known)
    spans = [(_span(node.tree.body), node) for node in nodes if isinstance(node.tree, ast.Lambda)]
    around = [(span, node) for span, node in spans if span[0] <= first and last <= span[1]]
    return [node for span, node in around if all(span[0] >= other[0] for other, _ in around)]


def _span(node: ast.expr) -> tuple[tuple[int, int], tuple[int, int]]:
    end = (node.end_lineno or node.lineno, node.end_col_offset or node.col_offset)
    return (node.lineno, node.col_offset), end


Places = dict[str, dict[int, _Place]]


@lru_cache(maxsize=16)
def _written(text: str, flags: int) -> Places:
    """Return the functions of a source by name and line; none where it does not compile."""
    found: Places = defaultdict(lambda: defaultdict(_Place))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
            awaits = flags | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT  # as cells of a notebook may
            module = compile(tree, "<source>", "exec", awaits, dont_inherit=True)
        for name, line, node in _functions(tree, None):
            found[name][line].nodes.append(node)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    for code in _codes(module):
        if code.co_firstlineno in found.get(code.co_name, ()):
            found[code.co_name][code.co_firstlineno].codes.append(code)
    return {name: dict(places) for name, places in found.items()}


def _functions(node: ast.AST, private: str | None) -> Iterator[tuple[str, int, _Node]]:
    """Yield name, first line and node of every function in a tree."""
    if isinstance(node, FUNCTIONS):
        first = next(iter(getattr(node, "decorator_list", ())), node)
        yield getattr(node, "name", "<lambda>"), first.lineno, _Node(node, private)
    inner = node.name if isinstance(node, ast.ClassDef) else private
    for child in ast.iter_child_nodes(node):
        yield from _functions(child, inner)


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _same(one: CodeType, other: CodeType) -> bool:
    return (
        all(getattr(one, name, None) == getattr(other, name, None) for name in COMPARED)
        and len(one.co_consts) == len(other.co_consts)
        and all(map(_same_constant, one.co_consts, other.co_consts))
    )


def _same_constant(one: Any, other: Any) -> bool:
    """Return whether constants are the same; by ``==`` 1 is True, and 0.0 is -0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, CodeType):
        return _same(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same_constant, one, other))
    if isinstance(one, frozenset):
        return sorted(map(repr, one)) == sorted(map(repr, other))
    return repr(one) == repr(other)
