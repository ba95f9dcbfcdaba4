"""The models that settings and benchmarks train, one a file; they import torch alone."""

from dattri_benchmarks.models.mlp import mlp, mnist_logistic_regression, mnist_mlp
from dattri_benchmarks.models.nano_gpt import NanoGPT, nano_gpt
from dattri_benchmarks.models.resnet9 import group_norm, resnet9

__all__ = [
    "NanoGPT",
    "group_norm",
    "mlp",
    "mnist_logistic_regression",
    "mnist_mlp",
    "nano_gpt",
    "resnet9",
]
