"""``reference/``: the public names of the packages, from their signatures and docstrings."""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

import attrs

import dattri_core
from generating.markdown import code, escaped, page, prose, table

SECTIONS = {name: f"{name}:" for name in ("Args", "Returns", "Raises", "Yields", "Attributes")}
SECTIONS["Args"] = "Arguments:"
GROUPS = {
    "attribution": (
        "What a user of a method calls.",
        (
            "methods task losses shipped_losses checkpoint adam_state fitted scores top plans "
            "store scores_writer processes"
        ),
    ),
    "protocols": ("What parts are and what they answer.", "protocols stages"),
    "capabilities": (
        "What a part may offer beyond its protocol.",
        "capabilities source_capabilities",
    ),
    "rows": ("Rows, blocks and spaces.", "rows blocks space lift moments"),
    "experiments": ("Settings, metrics, training again.", "experiment"),
    "studies": ("Ablations: factors, plans and points.", "study factors"),
    "errors": ("Errors and warnings.", "errors"),
    "plugins": (
        "What plugins are written with.",
        (
            "registry hookspecs assemble problem evaluate stream batch precision contract origins "
            "progress memory atomic tied dispatched pages"
        ),
    ),
}
"""Page -> what it is about, and the modules of dattri_core whose public names it has."""
PACKAGES = {
    "dattri_influence": "Products with Hessians and their inverses, for any function of tensors.",
    "dattri_metrics": "How good scores are.",
    "dattri_retrain": "Outcomes of models that were trained again, and attributions from them.",
    "dattri_unroll": "Recorded training runs.",
}
"""Plugins with functions of their own, a page each."""


def reference_pages() -> dict[str, str]:
    """Return the pages by their path.

    Raises:
        ValueError: A public name of dattri_core is in no group.
    """
    homes = {name: dattri_core._EXPORTS[name] for name in dattri_core.__all__}
    grouped = {module for _, modules in GROUPS.values() for module in modules.split()}
    strays = {name for name, module in homes.items() if module not in grouped}
    if strays:
        raise ValueError(f"reference: no page has {sorted(strays)}; add their modules to GROUPS")
    pages = {"reference.md": page(_index())}
    for group, (about, modules) in GROUPS.items():
        order = modules.split()
        names = [name for name in homes if homes[name] in order]
        names.sort(key=lambda name: (order.index(homes[name]), name.lower()))
        pages[f"reference/{group}.md"] = page(_page(group, "dattri_core", about, names))
    for package, about in PACKAGES.items():
        names = sorted(importlib.import_module(package).__all__, key=str.lower)
        pages[f"reference/{package}.md"] = page(_page(package, package, about, names))
    return pages


def _index() -> Iterator[str]:
    yield "# Reference"
    yield ""
    yield "Every public name, from its signature and docstring. What is in none of these pages is"
    yield "not public."
    yield ""
    rows = [(f"[{group}](reference/{group}.md)", about) for group, (about, _) in GROUPS.items()]
    rows += [(f"[`{name}`](reference/{name}.md)", about) for name, about in PACKAGES.items()]
    yield from table(("page", "what it has"), rows)


def _page(title: str, package: str, about: str, names: list[str]) -> Iterator[str]:
    yield f"# `{title}`" if title == package else f"# Reference: {title}"
    yield ""
    yield f"{about} Import from `{package}`."
    module = importlib.import_module(package)
    for name in names:
        yield ""
        yield f"## `{name}`"
        yield ""
        yield from _entry(name, getattr(module, name))


def _entry(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        if not getattr(value, "_is_protocol", False) and not issubclass(value, BaseException):
            yield from code(_signature(name, value))
            yield ""
        if value.__doc__ and not _made_by_attrs(value):
            yield from prose(inspect.getdoc(value) or "", SECTIONS)
        yield from _members(value)
    elif inspect.isfunction(value):
        yield from code(_signature(name, value))
        yield ""
        yield from prose(inspect.getdoc(value) or "", SECTIONS)
    elif typing.get_origin(value) is not None and typing.get_origin(value) is not typing.Literal:
        yield f"The type `{re.sub(r'[a-z_]+[.]', '', _spell(value))}`."
    elif typing.get_args(value):
        yield escaped(f"One of {', '.join(f'`{_spell(one)}`' for one in typing.get_args(value))}.")
    else:
        yield f"A value of type `{type(value).__name__}`."


def _members(cls: type) -> Iterator[str]:
    for name, value in vars(cls).items():
        if name.startswith("_"):
            continue
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if isinstance(value, property):
            document, head = inspect.getdoc(value.fget) or "", f"{name}"
        elif inspect.isfunction(function):
            document, head = inspect.getdoc(function) or "", _signature(name, function, bound=True)
        else:
            continue
        if document:
            yield ""
            yield f"### `{cls.__name__}.{name}`"
            yield ""
            if inspect.isfunction(function):
                yield from code(head)
                yield ""
            yield from prose(document, SECTIONS)


def _made_by_attrs(value: type) -> bool:
    return attrs.has(value) and (value.__doc__ or "").startswith("Method generated by attrs")


def _signature(name: str, value: Callable[..., Any], *, bound: bool = False) -> str:
    """Return a signature on one line, or a line for each parameter where it is long.

    It is spelled here and not by `inspect`, whose spelling differs between versions of Python.
    """
    signature = inspect.signature(value)
    parameters = list(signature.parameters.values())
    if bound and parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    words: list[str] = []
    starred = False
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            starred = True
        elif parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        words.append(_parameter(parameter))
    returned = ""
    if signature.return_annotation not in (inspect.Signature.empty, None, "None"):
        returned = f" -> {_spell(signature.return_annotation)}"
    line = f"{name}({', '.join(words)}){returned}"
    if len(line) <= 88:
        return line
    return "\n".join([f"{name}(", *(f"    {word}," for word in words), f"){returned}"])


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
    text = stars.get(parameter.kind, "") + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_spell(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        text += f" = {_default(parameter.default)}"
    return text


def _default(value: Any) -> str:
    if value is attrs.NOTHING or isinstance(value, attrs.Factory):  # type: ignore[arg-type]
        return "..."
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return repr(value)


def _spell(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    if inspect.isclass(annotation) and not typing.get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "")
