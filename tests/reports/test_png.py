"""The PNG encoder against an independent decoder."""

import base64
import io

import numpy as np
import pytest
from dattri_reports.png import data_address, png
from hypothesis import given, settings
from hypothesis import strategies as st


def decode(data):
    """Return the pixels, by Pillow where there is one, else by matplotlib; neither is ours."""
    image = pytest.importorskip("PIL.Image")
    found = image.open(io.BytesIO(data))
    found.load()  # checks the checksums
    assert found.format == "PNG"
    assert found.mode in ("L", "RGB")
    return np.asarray(found)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([(), (3,)]), st.integers(0, 2**32))
def test_every_image_comes_back(height, width, channels, seed):
    shape = (height, width, *channels)
    image = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(decode(png(image)), image)


def test_ink_is_dark_on_a_light_ground():
    image = np.array([[0, 255, 100]], np.uint8)
    head, _, body = data_address(image).partition(",")
    assert head == "data:image/png;base64"
    assert decode(base64.b64decode(body)).tolist() == [[255, 0, 155]]


def test_colours_stay_what_they_are():
    image = np.array([[[255, 0, 100], [1, 2, 3]]], np.uint8)
    body = data_address(image).partition(",")[2]
    assert np.array_equal(decode(base64.b64decode(body)), image)
