"""Settings: data, a model and how it is trained."""

from __future__ import annotations

import dattri_core as dattri


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.part(
        "setting",
        "digits",
        "dattri_benchmarks.digits:setting",
        "UCI handwritten digits, 1797 images of 8x8, shipped with the package",
    )
    registry.part(
        "setting",
        "mnist",
        "dattri_benchmarks.mnist:setting",
        "MNIST, images of 28x28, read from your copy of its files",
    )
