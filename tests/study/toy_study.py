"""The toy world of the tests of benchmarks, for studies; as a script it runs ``dattri ablate``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import torch
import toy_bench

from dattri_core import Study
from dattri_core.cli import main
from dattri_core.registry import using

SPECTRAL = {"curvature": "ekfac", "solver": "spectral"}
CHOLESKY = {"curvature": "gauss-newton", "solver": "cholesky"}
DATAINF = {"curvature": "gauss-newton", "solver": "datainf"}
SKETCH = {"name": "block-count-sketch", "dim": 8}
INVERSES = {"none": "identity", "ekfac": SPECTRAL, "datainf": DATAINF}


def study(**changes):
    """Return a study of milliseconds: 2 sketches x 3 inverse Hessians x 2 scorers, 2 seeds."""
    fields = {
        "name": "toy",
        "setting": "toy",
        "metrics": ["agreement", "flips"],
        "size": "small",
        "seeds": [0, 3],
        "factors": {
            "projector": {"none": "identity", "sketch": SKETCH},
            "inverse_hessian": INVERSES,
            "scorer": ["dot", "cosine"],
        },
    }
    return Study(**(fields | changes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with using(toy_bench.registry()):
        sys.exit(main(["ablate", *sys.argv[1:]]))
