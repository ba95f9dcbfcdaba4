"""The templates: files of this package, whose names are filled in and whose paths are kept."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from importlib.abc import Traversable
from importlib.resources import files
from string import Template

from dattri_core import __version__
from dattri_scaffold.names import Names

KINDS: Mapping[str, str] = {
    "scorer": "inner products over a power of the train row's norm",
    "source": "gradients in the inputs instead of the parameters",
    "projector": "a sketch that keeps a random sample of coordinates",
    "curvature": "one number a layer: the mean squared gradient",
    "solver": "a power of the damped inverse, from all eigenvalues",
    "fold": "an average over checkpoints in which later ones count for more",
    "metric": "how many wrong labels are among the most suspicious examples",
    "setting": "two noisy rings of points, and a linear model that tells them apart",
    "method": "the cosine of preconditioned gradients, from parts that are there already",
}
"""The kinds that have templates, and what the part of each does as it is written."""
WITHOUT_METHOD = frozenset({"metric", "setting"})
"""Kinds that no method is made of: their plugins bring none, and a README of their own."""
SUFFIX = ".template"
EVERY, SCORING = "every", "scoring"
"""Folders of what all plugins have, and of what those with a method have besides."""


def written(names: Names) -> dict[str, str]:
    """Return the files of a new plugin: path below its folder -> text."""
    values = {
        "part": names.part,
        "kind": names.kind,
        "distribution": names.distribution,
        "package": names.package,
        "cls": names.cls,
        "does": KINDS[names.kind],
        "core": __version__,
        "year": str(datetime.date.today().year),
    }
    found = {}
    shared = (EVERY,) if names.kind in WITHOUT_METHOD else (EVERY, SCORING)
    for folder in (*shared, names.kind):
        for path, text in _read(files("dattri_scaffold") / "templates" / folder, ""):
            place = path.replace("PACKAGE", names.package).replace("dot_", ".")
            found[place.removesuffix(SUFFIX)] = Template(text).substitute(values)
    return dict(sorted(found.items()))


def _read(folder: Traversable, path: str) -> Iterator[tuple[str, str]]:
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        here = f"{path}{item.name}"
        if item.is_dir():
            yield from _read(item, f"{here}/")
        elif here.endswith(SUFFIX):
            yield here, item.read_text(encoding="utf-8")
