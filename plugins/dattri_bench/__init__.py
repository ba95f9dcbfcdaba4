"""Benchmarks: methods by metrics by seeds in one setting; every cell is computed once."""
