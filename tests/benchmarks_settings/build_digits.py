"""Build plugins/dattri_benchmarks/data/digits.npz from the copy of the data in scikit-learn.

Run once, with scikit-learn installed; the result is committed and its checksum tested.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

TARGET = Path(__file__).parents[2] / "plugins" / "dattri_benchmarks" / "data" / "digits.npz"


def main() -> None:
    """Write images ``[1797, 8, 8]`` of 0 to 16 and labels ``[1797]`` as bytes."""
    found = load_digits()
    images, labels = found.images, found.target
    assert images.shape == (1797, 8, 8)
    assert np.array_equal(images, images.astype(np.uint8))
    np.savez_compressed(TARGET, images=images.astype(np.uint8), labels=labels.astype(np.uint8))


if __name__ == "__main__":
    main()
