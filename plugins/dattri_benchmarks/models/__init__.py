"""The models that settings and benchmarks train, one a file; they import torch alone."""

from dattri_benchmarks.models.mlp import mlp, mnist_logistic_regression, mnist_mlp
from dattri_benchmarks.models.music_transformer import MusicTransformer, music_transformer
from dattri_benchmarks.models.nano_gpt import NanoGPT, gpt2, nano_gpt
from dattri_benchmarks.models.resnet9 import group_norm, resnet9

__all__ = [
    "MusicTransformer",
    "NanoGPT",
    "gpt2",
    "group_norm",
    "mlp",
    "mnist_logistic_regression",
    "mnist_mlp",
    "music_transformer",
    "nano_gpt",
    "resnet9",
]
