"""Shared parts: sources, projectors, curvatures, solvers, scorers and folds."""
