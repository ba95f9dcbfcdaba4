"""Labels drawn from a softmax: picked by groups of classes as by the sum over all of them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dattri_core.criteria import softmax_sample


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 1200), st.integers(0, 2**31), st.booleans())
def test_labels_of_many_classes_are_those_of_the_whole_sum(classes, seed, masked):
    """Groups of classes are added up first: the label is that of the sum over all classes."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(7, classes, generator=generator, dtype=torch.float64)
    if masked and classes > 1:
        logits[:, torch.rand(classes, generator=generator) < 0.5] = float("-inf")
        logits[:, 0] = 0.0
    uniform = torch.rand(7, generator=generator, dtype=torch.float64)
    uniform[0] = 0.0
    slope = softmax_sample(logits, torch.ones(7), uniform)
    probabilities = logits.softmax(-1)
    reached = probabilities.cumsum(-1)
    wanted = (uniform * reached[:, -1]).unsqueeze(-1)
    label = torch.searchsorted(reached, wanted, right=True).clamp_max(classes - 1)
    expected = probabilities.scatter_add(1, label, -torch.ones(7, 1, dtype=torch.float64))
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-14)
