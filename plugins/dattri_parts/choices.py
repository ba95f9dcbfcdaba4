"""Choices on the command line: registered names, some of their fields set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import field, frozen

from dattri_core import InputError, default_registry, nearest

EVERY = "all"


@frozen
class Choice:
    """A registered name, and fields that are set: ``trak:size=4096:damping=1e-3``.

    Args:
        name: Of a method, metric or setting.
        fields: That are set.
        title: What tables call it instead.
    """

    name: str
    fields: Mapping[str, Any] = field(factory=dict)
    title: str | None = None

    @property
    def label(self) -> str:
        """Return how tables call it: ``trak (size=4096, damping=0.001)``."""
        if self.title is not None:
            return self.title
        return f"{self.name} ({self.setters})" if self.fields else self.name

    @property
    def setters(self) -> str:
        """Return the fields that are set, as text."""
        return ", ".join(f"{key}={_spelled(value)}" for key, value in self.fields.items())


def choices_of(
    kind: str, words: Sequence[str], every: Callable[[str], bool] = lambda name: True
) -> list[Choice]:
    """Return what was chosen, each once, in the order given.

    Args:
        kind: ``"method"`` or ``"metric"``.
        words: As typed: names separated by spaces or commas, or ``all``; ``NAME:FIELD=VALUE`` sets
            a field, where VALUE is JSON, or text that is none. Commas and colons inside brackets
            and strings of JSON separate nothing.
        every: Whether ``all`` means a name too.

    Raises:
        InputError: No such name, a field without a value, or a bracket that is not closed.
    """
    valid = default_registry().names(kind)
    found: list[Choice] = []
    for word in (word for given in words for word in outside(given, ",") if word):
        if word == EVERY:
            chosen = [Choice(name) for name in valid if every(name)]
        else:
            chosen = [_known(kind, choice_of(word), valid)]
        found += [choice for choice in chosen if choice not in found]
    if not found:
        raise InputError(f"no {kind} was named; valid: {', '.join([EVERY, *valid])}")
    return found


def _known(kind: str, choice: Choice, valid: Sequence[str]) -> Choice:
    name = choice.name
    if name not in valid:
        hint = "; set a field by NAME:FIELD=VALUE" if ":" in name else ""
        raise InputError(f"no {kind} {name!r}; {nearest(name, [*valid, EVERY])}{hint}")
    return choice


def choice_of(word: str) -> Choice:
    """Return what one word says: ``NAME``, or ``NAME:FIELD=VALUE`` with any number of fields.

    Raises:
        InputError: A bracket or a string of JSON is not closed.
    """
    name, *fields = _pieces(word)
    return Choice(name, dict(_set(field) for field in fields))


def setting_of(word: str) -> Any:
    """Return the setting of ``NAME`` or ``NAME:FIELD=VALUE``, with these fields changed.

    Raises:
        InputError: A bracket or a string of JSON is not closed.
        SpecError: No such setting or field, or a value of the wrong type.
        PluginError: What is registered cannot be imported.
    """
    choice = choice_of(word)
    return default_registry().make("setting", choice.name, **choice.fields)


def _pieces(word: str) -> list[str]:
    """Return the name and each ``FIELD=VALUE``; a colon that no FIELD= follows is of the value."""
    found: list[str] = []
    for piece in outside(word, ":"):
        if found and not re.match(r"[\w.]+=", piece):
            found[-1] += f":{piece}"
        else:
            found.append(piece)
    return found


def outside(text: str, separator: str) -> list[str]:
    """Return text cut at a separator, but not inside brackets or strings of JSON.

    Raises:
        InputError: A bracket or a string is not closed.
    """
    pieces, depth, quoted, escaped = [""], 0, False, False
    for letter in text:
        if quoted:
            quoted = letter != '"' or escaped
            escaped = letter == "\\" and not escaped
        elif letter == '"':
            quoted = True
        elif letter == separator and depth == 0:
            pieces.append("")
            continue
        else:
            depth += (letter in "[{") - (letter in "]}")
        pieces[-1] += letter
    if quoted or depth:
        raise InputError(
            f"{text!r} has a bracket or a quotation mark without its other half; write JSON "
            "values whole, in quotation marks of the shell: 'removal-curve:shares=[0.0,0.3]'"
        )
    return pieces


def _set(word: str) -> tuple[str, Any]:
    key, _, text = word.partition("=")
    return key, value_of(text)


def value_of(text: str) -> Any:
    """Return JSON as its value, and any other text as it is."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
