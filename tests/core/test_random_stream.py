"""Random numbers by key: many at once are those of one generator after the other."""

import pytest
import torch

from dattri_core import RandomStream
from dattri_core.row_kinds import uniform


@pytest.mark.parametrize("shapes", [[()], [(3,), (), (2, 40)]])
def test_numbers_of_many_keys_are_those_of_their_generators(shapes):
    stream, keys = RandomStream(3, "curvature", 2), [("fisher", at, 1) for at in (0, 7, 7, 2**40)]
    found = uniform(stream, keys, shapes)
    for at, key in enumerate(keys):
        generator = stream.generator(*key)
        for numbers, shape in zip(found, shapes, strict=True):
            want = torch.rand(shape, generator=generator, dtype=torch.float64)
            assert torch.equal(numbers[at], want)
    assert [numbers.shape for numbers in uniform(stream, [], shapes)] == [(0, *s) for s in shapes]
