"""Facts: what rows of outcomes belong to, and the manifest that says so."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attrs import frozen

from dattri_core import InputError, Retraining, StoreError, write_text
from dattri_core import __version__ as dattri_version

MANIFEST = "manifest.json"
FORMAT = "dattri-counterfactual-store"
VERSION = 1
LIBRARIES = ("torch", "numpy")


@frozen
class Facts:
    """What a row of outcomes belongs to.

    Args:
        fingerprint: Of the retraining.
        n_train: Length of a mask.
        n_test: Length of an outcome.
        targets: Names of what was measured, and whether more of it is better.
    """

    fingerprint: str
    n_train: int
    n_test: int
    targets: Mapping[str, bool]

    @staticmethod
    def of(retraining: Retraining) -> Facts:
        """Return the facts of a retraining.

        Raises:
            InputError: It is no retraining, or its fingerprint cannot name a folder.
        """
        if not isinstance(retraining, Retraining):
            raise InputError(
                f"counterfactual store: got a {type(retraining).__name__}, expected a Retraining: "
                "fingerprint, n_train, n_test, targets, together, train and measure, such as "
                "world.retraining of a setting"
            )
        fingerprint = retraining.fingerprint
        if not isinstance(fingerprint, str) or not re.fullmatch(r"\w[\w.\-]{0,127}", fingerprint):
            raise InputError(
                f"counterfactual store: the fingerprint {fingerprint!r} cannot name a folder; a "
                "hash of up to 128 letters and digits can"
            )
        targets = {str(name): bool(better) for name, better in retraining.targets.items()}
        if not targets:
            raise InputError("counterfactual store: the retraining measures no target")
        return Facts(fingerprint, int(retraining.n_train), int(retraining.n_test), targets)

    @staticmethod
    def of_plain(data: Mapping[str, Any]) -> Facts:
        """Return what `plain` wrote; raises KeyError or TypeError for anything else."""
        return Facts(
            data["fingerprint"], data["n_train"], data["n_test"], dict(data["targets"].items())
        )

    def plain(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return {
            "fingerprint": self.fingerprint,
            "n_train": self.n_train,
            "n_test": self.n_test,
            "targets": dict(self.targets),
        }

    def require(self, theirs: Facts, what: str) -> None:
        """Raise `StoreError` when what lies on the disk belongs to something else."""
        mine, found = self.plain(), theirs.plain()
        other = {key: (found[key], mine[key]) for key in mine if found[key] != mine[key]}
        if other:
            listed = "; ".join(
                f"{key} is {got!r}, this retraining's is {want!r}"
                for key, (got, want) in other.items()
            )
            raise StoreError(
                f"counterfactual store: {what} belongs to another retraining: {listed}; move it "
                "away, or make the fingerprint cover what changed"
            )


def read_manifest(folder: Path) -> Facts | None:
    """Return what the rows of a folder belong to; None where there is no manifest yet.

    Raises:
        StoreError: The manifest is damaged, foreign, or of a later version.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StoreError(
            f"counterfactual store: {str(path)!r} is damaged ({error}); delete it, and the next "
            "run writes it again"
        ) from error
    try:
        held = data["format"], data["version"]
        facts = Facts.of_plain(data["facts"])
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"counterfactual store: {str(path)!r} is not the manifest of such a store; give "
            "another folder"
        ) from error
    if held != (FORMAT, VERSION):
        raise StoreError(
            f"counterfactual store: {str(path)!r} is {held[0]} version {held[1]}, expected "
            f"{FORMAT} version {VERSION}; use the dattri-core that wrote it"
        )
    return facts


def write_manifest(folder: Path, facts: Facts) -> None:
    """Write the manifest, once; two processes that do it at once write the same facts."""
    if read_manifest(folder) is None:
        data = {"format": FORMAT, "version": VERSION, "facts": facts.plain()}
        text = json.dumps({**data, "versions": versions()}, indent=2)
        write_text(folder / MANIFEST, text + "\n")


def versions() -> dict[str, str]:
    """Return the versions that outcomes were computed with."""
    found = {name: version(name) for name in LIBRARIES}
    return {"dattri-core": dattri_version, "python": platform.python_version(), **found}
