"""Runs and cells of studies in TensorBoard, for dattri-core."""
