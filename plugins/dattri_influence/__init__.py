"""Influence functions: recipes."""
