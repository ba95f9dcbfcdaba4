"""Oracles that tests share: slow and plain ways to the same numbers."""
