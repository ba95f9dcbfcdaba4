"""Metrics: how good scores are."""
