"""The setting ``shakespeare-nanogpt``: the characters of Shakespeare's plays and nanoGPT."""

from __future__ import annotations

from dattri_parts.training import Recipe

from dattri_benchmarks.models import NanoGPT, nano_gpt
from dattri_benchmarks.sequences import Scale, Sequences, SequenceSetting, choose
from dattri_benchmarks.shakespeare import read_sequences

CHARACTERS = 65


def _full() -> NanoGPT:
    return nano_gpt(CHARACTERS, 256, bias=False, tied=True)


def _small() -> NanoGPT:
    return nano_gpt(CHARACTERS, 64, layers=2, width=64, heads=4, bias=False, tied=True)


def _read(scale: Scale, seed: int) -> Sequences:
    found, ids = [], []
    for what, codes, count in zip(
        ("train", "test"), read_sequences(scale.length), scale.size, strict=True
    ):
        chosen = choose(count, len(codes), seed, what)
        found.append(codes[chosen])
        ids.append(tuple(f"{what}-{k}" for k in chosen))
    return Sequences(found[0], found[1], ids[0], ids[1], {})


setting = SequenceSetting(
    name="shakespeare-nanogpt",
    title="Tiny Shakespeare by characters (Karpathy 2015, public domain)",
    read=_read,
    full=Scale(
        size=(3921, 435),
        length=256,
        vocabulary=CHARACTERS,
        model="nanoGPT, 6 layers of width 384, 6 heads",
        build=_full,
        recipe=Recipe(
            epochs=15,
            batch=64,
            learning_rate=1e-3,
            weight_decay=0.1,
            optimizer="adamw",
            betas=(0.9, 0.99),
            warmup=100,
            keep=(1, 3, 6, 10, 15),
            clip=1.0,
        ),
    ),
    small=Scale(
        size=(200, 40),
        length=64,
        vocabulary=CHARACTERS,
        model="nanoGPT, 2 layers of width 64, 4 heads",
        build=_small,
        recipe=Recipe(
            epochs=20,
            batch=20,
            learning_rate=3e-3,
            weight_decay=0.1,
            optimizer="adamw",
            betas=(0.9, 0.99),
            warmup=10,
            keep=(2, 5, 10, 20),
            clip=1.0,
        ),
    ),
    damping=0.1,
)
"""3921 and 435 sequences of 256 characters with the network of 10,745,088 parameters."""
