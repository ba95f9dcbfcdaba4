"""Specs: methods and runs as TOML or JSON, both ways; nothing in a file is ever executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from dattri_core import assemble
from dattri_core.atomic import write_text
from dattri_core.errors import SpecError, StoreError, nearest
from dattri_core.methods import Method, method
from dattri_core.toml import TOMLDecodeError, read_toml, write_toml

FORMATS = (".toml", ".json")


def method_of(data: str | Mapping[str, Any]) -> Any:
    """Return the method that a name or a mapping spells.

    Args:
        data: ``"if-cg"``; ``{"name": "if-cg", "damping": 1e-2}``, a recipe with overrides; or the
            slots of `Method`, or ``{"attributor": ...}``, each by name or mapping.

    Raises:
        SpecError: No such method, slot, part or field; the nearest names are offered.
    """
    if isinstance(data, str):
        return method(data)
    if not isinstance(data, Mapping):
        raise SpecError(f"method: got {data!r}, expected a name or a mapping of slots to parts")
    if "name" in data:
        name, overrides = data["name"], {k: v for k, v in data.items() if k != "name"}
        if not isinstance(name, str):
            raise SpecError(f"method: name is {name!r}, expected the name of a method")
        return method(name, **overrides)
    slots = assemble.build_slots(data)
    return slots["attributor"] if "attributor" in slots else Method(**slots)


def spec_of(made: Any) -> dict[str, Any]:
    """Return a method as plain data, from which `method_of` makes an equal one."""
    if isinstance(made, Method):
        return assemble.describe_method(made)
    return {"attributor": assemble.describe_part(made)}


def to_toml(made: Any) -> str:
    """Return a method as TOML. Raises `SpecError` for what TOML cannot hold (None): use JSON."""
    return write_toml(spec_of(made))


def to_json(made: Any) -> str:
    """Return a method as JSON."""
    return json.dumps(spec_of(made), indent=2, ensure_ascii=False) + "\n"


def from_toml(text: str) -> Any:
    """Return the method that a TOML text spells."""
    return method_of(_parse(text, ".toml", "method"))


def from_json(text: str) -> Any:
    """Return the method that a JSON text spells."""
    return method_of(_parse(text, ".json", "method"))


def save_method(made: Any, path: str | Path) -> None:
    """Write a method to a ``.toml`` or ``.json`` file, atomically."""
    path = Path(path)
    write = {".toml": to_toml, ".json": to_json}.get(path.suffix)
    if write is None:
        raise SpecError(f"spec {str(path)!r}: end the name with {' or '.join(FORMATS)}")
    write_text(path, write(made))


def load_method(path: str | Path) -> Any:
    """Read a method from a ``.toml`` or ``.json`` file.

    Raises:
        StoreError: The file is truncated, foreign, a pickle, or not UTF-8.
        SpecError: It spells no method.
    """
    return method_of(read_data(path))


def read_data(path: str | Path) -> dict[str, Any]:
    """Read plain data from a TOML or JSON file.

    Raises:
        StoreError: The file does not exist, is truncated, foreign, a pickle, or not UTF-8.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise StoreError(f"spec {str(path)!r}: expected a file ending with {' or '.join(FORMATS)}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StoreError(f"spec {str(path)!r}: cannot be read ({error.strerror})") from error
    label = f"spec {str(path)!r}"
    if raw[:1] == b"\x80" or raw[:4] == b"PK\x03\x04":
        raise StoreError(
            f"{label}: is a pickle or a torch file, which can run code and is never loaded; "
            "specs are TOML or JSON text"
        )
    if not raw.strip():
        raise StoreError(f"{label}: is empty")
    try:
        # A file that another system's editor saved may begin with a byte order mark.
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StoreError(
            f"{label}: is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    return _parse(text, path.suffix, label)


def _parse(text: str, suffix: str, label: str) -> dict[str, Any]:
    try:
        data = read_toml(text) if suffix == ".toml" else json.loads(text)
    except (TOMLDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise StoreError(
            f"{label}: is no {suffix[1:].upper()}, or is truncated ({error})"
        ) from error
    if not isinstance(data, dict):
        raise StoreError(f"{label}: holds a {type(data).__name__}, expected names and values")
    return data


def _path(name: str, value: Any) -> Path | None:
    if value is not None and not isinstance(value, (str, Path)):
        raise SpecError(f"run: {name} is {value!r}, expected the path of a folder")
    return None if value is None else Path(value)


def _output(value: Any) -> Path | None:
    return _path("output", value)


def _store(value: Any) -> Path | None:
    return _path("store", value)


def _fits(value: Any) -> Path | None:
    return _path("fits", value)


@frozen
class Run:
    """What ``dattri run`` does: a method, a setting that gives task, train and test, an output.

    Args:
        method: A name, or a mapping as `method_of` takes it.
        setting: Name of a registered setting, or ``"module:function"``.
        setting_fields: What the setting is loaded with, and fields of its own that are set.
        output: Folder for the scores.
        memory: Budget such as ``"4GiB"``.
        store: Folder for train rows; see `Method.fit`.
        fits: Folder for what fits compute; see `Method.fit`.
    """

    method: str | Mapping[str, Any]
    setting: str
    setting_fields: Mapping[str, Any] = field(factory=dict)
    output: Path | None = field(default=None, converter=_output)
    memory: str | int | None = None
    store: Path | None = field(default=None, converter=_store)
    fits: Path | None = field(default=None, converter=_fits)


def run_of(data: Mapping[str, Any], label: str = "run") -> Run:
    """Return the run that a mapping spells; ``setting`` is a name or ``{"name": ..., fields}``.

    Raises:
        SpecError: A key is missing or unknown.
    """
    valid = ("method", "setting", "output", "memory", "store", "fits")
    for key in data:
        if key not in valid:
            raise SpecError(f"{label}: no key {key!r}; {nearest(key, valid)}")
    for key in ("method", "setting"):
        if key not in data:
            raise SpecError(f"{label}: has no {key!r}; write e.g. {key} = {_EXAMPLES[key]}")
    setting = data["setting"]
    given = dict(setting) if isinstance(setting, Mapping) else {"name": setting}
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise SpecError(
            f"{label}: setting is {setting!r}, expected the name of a setting, "
            '"module:function", or a table with a name and fields'
        )
    rest = {key: value for key, value in data.items() if key != "setting"}
    return Run(setting=name, setting_fields=given, **rest)


def read_run(path: str | Path) -> Run:
    """Read a run from a TOML or JSON file.

    Raises:
        StoreError: The file is truncated, foreign, a pickle, or not UTF-8.
        SpecError: A key is missing or unknown.
    """
    run = run_of(read_data(path), f"run {str(path)!r}")
    # Fail before any data is read: a spec that spells no method costs nothing to refuse.
    method_of(run.method)
    return run


_EXAMPLES = {"method": '"if-cg"', "setting": '"digits"'}
