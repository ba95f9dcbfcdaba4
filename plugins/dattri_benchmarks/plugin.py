"""Settings: data, a model and how it is trained."""

from __future__ import annotations

import dattri_core as dattri

SETTINGS = (
    (
        "digits",
        "digits:setting",
        "UCI handwritten digits, 1797 images of 8x8, shipped with the package",
    ),
    (
        "digits-parity",
        "digits_known:parity_setting",
        "The digits, odd or even: which digit is a subclass that the model is not told",
    ),
    (
        "digits-marked",
        "digits_known:marked_setting",
        "The digits with a mark in the corner of the train images of one: a shortcut",
    ),
    (
        "digits-mixed",
        "digits_known:mixed_setting",
        "The digits, half of them as negatives: a mixture of two sources",
    ),
    ("mnist-lr", "mnist:lr_setting", "MNIST with logistic regression, to its optimum"),
    (
        "mnist-lr-sgd",
        "mnist:lr_sgd_setting",
        "MNIST with logistic regression, 20 epochs of plain SGD as in dattri's benchmark",
    ),
    ("mnist-mlp", "mnist:mlp_setting", "MNIST with a network of 109,386 parameters"),
    (
        "cifar2-resnet9",
        "cifar:cifar2_setting",
        "Cats and dogs of CIFAR-10 with ResNet-9, 4.8M parameters",
    ),
    ("cifar10-resnet9", "cifar:cifar10_setting", "CIFAR-10 with ResNet-9, 4.8M parameters"),
    (
        "shakespeare-nanogpt",
        "shakespeare_nano_gpt:setting",
        "Characters of Shakespeare with nanoGPT, 10.7M parameters",
    ),
    (
        "wikitext2-gpt2",
        "wikitext2_gpt2:setting",
        "Words of Wikipedia with a network of GPT-2's shape, 111M parameters",
    ),
    (
        "maestro-music-transformer",
        "maestro_music_transformer:setting",
        "Piano performances as events with the Music Transformer, 13.3M parameters",
    ),
)


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    for name, target, summary in SETTINGS:
        registry.part("setting", name, f"dattri_benchmarks.{target}", summary)
