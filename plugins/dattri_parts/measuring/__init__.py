"""Measuring: what an attribution takes, and on which machine."""
