"""Gradient similarity between the inner product and the cosine, for dattri-core."""
