"""``methods.md``, and a page for each method: formula, cost, parts, defaults, what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dattri_core import assemble
from dattri_core.registry import Registry, default_registry
from dattri_core.toml import write_toml
from generating.fields_of import value_rows
from generating.markdown import DISTRIBUTION, code, page, table
from generating.notes import note_rows
from generating.parts import KINDS
from generating.results import benchmark_rows, measured_rows

FAMILIES = {
    "Influence functions": ("if-", "relatif-"),
    "Influence in a sketch": ("logra", "grass", "factgrass", "trak"),
    "Gradient products and along training": (
        "grad-dot",
        "grad-cos",
        "tracin",
        "less",
        "dvemb",
        "in-run-",
        "magic",
        "magic",
        "source",
    ),
    "Features, neighbours, representer points": ("embedding-", "knn-", "rps-"),
    "By training again": (
        "leave-one-out",
        "shapley",
        "tmc-shapley",
        "beta-shapley",
        "banzhaf",
        "data-oob",
        "datamodels",
    ),
    "Baselines": (),
}
"""Title -> what the names of its methods begin with; the first that fits, and the last for all."""


def methods_pages() -> dict[str, str]:
    """Return the pages by their path."""
    registry = default_registry()
    recipes = [registry.recipe(name) for name in registry.names("method")]
    shipped = [recipe for recipe in recipes if recipe.origin.distribution == DISTRIBUTION]
    pages = {"methods.md": page(_index(shipped))}
    for recipe in shipped:
        pages[f"methods/{recipe.name}.md"] = page(_method(registry, recipe))
    return pages


def _index(recipes: list[Any]) -> Iterator[str]:
    yield "# Methods"
    yield ""
    yield "What comes with dattri-core. `dattri methods` lists what is installed, and"
    yield "`dattri show NAME` prints one. [Choosing a method](choosing.md) says which to take;"
    yield "[parts](parts.md) what they are made of."
    yield ""
    yield "g_i is the gradient of the train loss of example i, h_j that of the target of test"
    yield "example j, its sign turned where more of the target is better. Positive scores help; see"
    yield "[conventions](conventions.md)."
    for family in FAMILIES:
        rows = [
            (f"[`{recipe.name}`](methods/{recipe.name}.md)", f"{recipe.summary}.")
            for recipe in recipes
            if _family(recipe.name) == family
        ]
        if rows:
            yield ""
            yield f"## {family}"
            yield ""
            yield from table(("method", "what it is"), rows)


def _family(name: str) -> str:
    for family, beginnings in FAMILIES.items():
        if name.startswith(beginnings):
            return family
    return family


def _method(registry: Registry, recipe: Any) -> Iterator[str]:
    yield f"# `{recipe.name}`"
    yield ""
    yield f"{recipe.summary}."
    yield ""
    yield from code(recipe.formula)
    yield ""
    yield f"Source: {recipe.citation}."
    notes = note_rows("method", recipe.name)
    if notes:
        yield ""
        yield from table(("Notes", ""), notes)
    built = assemble.build_slots(recipe.spec)
    parts = {slot: part for slot, part in built.items() if _is_part(part)}
    plain = {slot: assemble.describe_part(part) for slot, part in parts.items()}
    yield ""
    yield "## Parts"
    yield ""
    yield from code(write_toml(plain).strip(), "toml")
    links = [f"{slot} {link}" for slot, link in _links(registry, plain)]
    if links:
        yield ""
        yield f"One by one: {', '.join(links)}."
    rows = [row for slot, part in parts.items() for row in value_rows(slot, part)]
    if rows:
        yield ""
        yield "## Values"
        yield ""
        yield "Defaults included; each is set by its name, or by as much of its path as tells it"
        yield "apart."
        yield ""
        yield from table(("field", "value"), rows)
    yield from _measured(recipe.name)


def _measured(name: str) -> Iterator[str]:
    quality, cost = list(benchmark_rows(name)), list(measured_rows(name))
    if quality or cost:
        yield ""
        yield "## Measured"
    if quality:
        yield ""
        yield from table(("setting", "metric", "value", "rank", "seconds"), quality)
    if cost:
        yield ""
        yield from table(("table", "row", "time", "peak"), cost)


def _links(registry: Registry, spec: Any) -> Iterator[tuple[str, str]]:
    """Yield each slot of a spec with a link to the part that it names, at any depth."""
    for slot, value in spec.items():
        named = value.get("name") if hasattr(value, "get") else value
        if isinstance(named, str) and slot in KINDS and named in registry.names(slot):
            yield slot.replace("_", " "), f"[`{named}`](../parts/{slot}.md#{named})"
        if hasattr(value, "items"):
            yield from _links(registry, value)


def _is_part(value: Any) -> bool:
    return value is not None and not isinstance(value, int)
