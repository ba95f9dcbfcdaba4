"""Nearest-neighbour search of influential train examples with FAISS, for dattri-core."""

from dattri_faiss.index import TrainIndex

__all__ = ["TrainIndex"]
