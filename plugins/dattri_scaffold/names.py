"""The names of a new plugin: one word of the user's, and all that follow from it."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, distribution

from attrs import frozen

from dattri_core import Registry, SpecError

PREFIX = "dattri-"
LONGEST = 30
"""Letters of a name, so that no line that holds it grows beyond the width of the code."""


@frozen
class Names:
    """How a plugin's pieces are called.

    Args:
        part: Of the part and of the method, as users type it: ``soft-cosine``.
        kind: Of the part.
    """

    part: str
    kind: str

    @property
    def distribution(self) -> str:
        """Return what pip installs: ``dattri-soft-cosine``."""
        return PREFIX + self.part

    @property
    def package(self) -> str:
        """Return what Python imports: ``dattri_soft_cosine``."""
        return self.distribution.replace("-", "_")

    @property
    def cls(self) -> str:
        """Return the class of the part: ``SoftCosineScorer``."""
        return "".join(word.capitalize() for word in self.part.split("-")) + self.kind.capitalize()


def names_of(text: str, kind: str, registry: Registry) -> Names:
    """Return the names that follow from one, which may carry the prefix ``dattri-``.

    Raises:
        SpecError: It is no name, or something that is installed has it.
    """
    part = text.removeprefix(PREFIX)
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", part):
        raise SpecError(
            f"new-plugin: {text!r} is no name for a plugin: {_fault(part)}. The distribution, the "
            "package and the class are named after it, so it is small letters and digits in words "
            f"that single hyphens join, a letter first{_mended(part)}"
        )
    if len(part) > LONGEST:
        raise SpecError(
            f"new-plugin: {text!r} has {len(part)} letters; give at most {LONGEST}, since users "
            "type it"
        )
    names = Names(part, kind)
    _require_free(names, registry)
    return names


def _fault(part: str) -> str:
    if not part:
        return "it is empty"
    if part != part.lower():
        return "it has capital letters"
    if strange := re.search(r"[^a-z0-9-]", part):
        return f"it has {strange[0]!r}"
    if part[0].isdigit():
        return "it begins with a digit"
    return "it has a hyphen at an end, or two together"


def _mended(part: str) -> str:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", part).lower()
    words = re.sub(r"[^a-z0-9]+", "-", snake).lstrip("-0123456789").strip("-")
    return f": {words!r}, say" if words else ", as in 'soft-cosine'"


def _require_free(names: Names, registry: Registry) -> None:
    for kind in (names.kind, "method"):
        if names.part in registry.names(kind):
            found = next(e for e in registry.entries() if (e.kind, e.name) == (kind, names.part))
            raise SpecError(
                f"new-plugin: the name {names.part!r} is taken: {found.origin} has a {kind} of "
                "that name, and two plugins that claim one name make it an error; choose another"
            )
    try:
        version = distribution(names.distribution).version
    except PackageNotFoundError:
        version = None
    if version is not None:
        raise SpecError(
            f"new-plugin: {names.distribution} {version} is installed; choose another name, or "
            f"uninstall it first: pip uninstall {names.distribution}"
        )
    if importlib.util.find_spec(names.package) is not None:
        raise SpecError(
            f"new-plugin: Python finds a package {names.package!r} already; choose another name"
        )
