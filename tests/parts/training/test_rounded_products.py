"""Products in TF32: while a model trains and no longer, only where asked, and told apart."""

import pytest
import torch
import training_toys as toys
from dattri_parts.training import Optimum, Recipe, products, random_subsets
from dattri_parts.training.products import rounded_products
from torch import nn

from dattri_core import InputError

CUDA = torch.device("cuda")
RECIPE = Recipe(epochs=2, batch=20, learning_rate=0.1)
MATMUL = torch.backends.cuda.matmul
NEWER = hasattr(MATMUL, "fp32_precision")


def flags():
    """Return what torch says of products; the older names may be unreadable."""
    try:
        older = MATMUL.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None
    return older, getattr(MATMUL, "fp32_precision", None)


def rounds():
    older, newer = flags()
    return newer == "tf32" if older is None else older[0]


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.set_float32_matmul_precision("highest")
    if NEWER:
        MATMUL.fp32_precision = "none"


def set_newer(precision):
    if not NEWER:
        pytest.skip("this torch has the older names alone")
    MATMUL.fp32_precision = precision


STATES = {
    "as torch starts": lambda: None,
    "exact": lambda: torch.set_float32_matmul_precision("highest"),
    "rounded already": lambda: torch.set_float32_matmul_precision("high"),
    "coarser on a CPU": lambda: torch.set_float32_matmul_precision("medium"),
    "exact by the newer name": lambda: set_newer("ieee"),
    "rounded by the newer name": lambda: set_newer("tf32"),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_flags_are_set_and_restored(state):
    state()
    before = flags()
    with rounded_products(True, CUDA):
        assert rounds()
        if before[0] is not None:
            assert flags()[0] is not None  # what can be read by both names still can
    assert flags() == before
    with pytest.raises(KeyError), rounded_products(True, CUDA):
        raise KeyError
    assert flags() == before


def test_nothing_is_set_where_it_is_not_allowed_or_no_such_device():
    before = flags()
    for allowed, device in ((False, CUDA), (True, torch.device("cpu"))):
        with rounded_products(allowed, device):
            assert flags() == before


def watching(seen):
    """Return a builder of models that note whether products are rounded in a forward pass."""

    class Watching(nn.Linear):
        def forward(self, x):
            seen.append((self.training, rounds()))
            return super().forward(x)

    return lambda: Watching(toys.WIDTH, toys.CLASSES)


@pytest.mark.parametrize("together", [1, 2])
def test_training_rounds_and_measuring_does_not(together, monkeypatch):
    monkeypatch.setattr(products, "ROUNDING", ("cpu", "cuda"))
    for tf32 in (False, True):
        seen = []
        made = toys.retraining(watching(seen), RECIPE, tf32=tf32, together=together)
        for state in made.train(random_subsets(toys.N, 2)):
            assert not rounds()  # nor what is done between two models
            made.measure(state)
        training = [found for mode, found in seen if mode]
        assert training
        assert set(training) == {tf32}
        assert not any(found for mode, found in seen if not mode)
    made.steps(toys.everything())
    assert [found for mode, found in seen if mode][-1]


def test_the_fingerprint_tells_rounded_training_apart():
    plain, same, rounded = (
        toys.retraining(toys.network, RECIPE, tf32=tf32).fingerprint
        for tf32 in (False, False, True)
    )
    assert plain == same != rounded


def test_an_optimum_has_no_products_in_float32():
    with pytest.raises(InputError, match="tf32 is for a Recipe"):
        toys.retraining(toys.logistic, Optimum(1e-2), tf32=True)


@pytest.mark.cuda
def test_a_cuda_device_rounds():
    left, right = torch.randn(2, 512, 512, device=CUDA, generator=torch.Generator(CUDA)).unbind(0)
    exact = left.double() @ right.double()
    far = (left @ right - exact).abs().max().item()
    with rounded_products(True, CUDA):
        rounded = (left @ right - exact).abs().max().item()
    assert rounded > 20 * far
    assert (left @ right - exact).abs().max().item() == far
