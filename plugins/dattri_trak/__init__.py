"""TRAK and TrackStar: sketched gradients, of margins or of losses, and ensembles of models."""

from __future__ import annotations

from dattri_trak.ensemble import subset, train_ensemble

__all__ = ["subset", "train_ensemble"]
