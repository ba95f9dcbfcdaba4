"""Solvers: the damped inverse of a curvature."""
