"""Gradient sources."""
