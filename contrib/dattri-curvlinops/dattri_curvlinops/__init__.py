"""The curvature matrices of curvlinops, for dattri-core."""
