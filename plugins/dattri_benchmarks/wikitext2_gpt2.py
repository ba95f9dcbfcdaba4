"""The setting ``wikitext2-gpt2``: the words of Wikipedia and a network of GPT-2's shape."""

from __future__ import annotations

from dattri_parts.training import Recipe

from dattri_benchmarks.models import NanoGPT, gpt2
from dattri_benchmarks.sequences import Scale, Sequences, SequenceSetting, choose
from dattri_benchmarks.wikitext import WORDS, read_word_sequences

FEW_WORDS = 2000


def _full() -> NanoGPT:
    return gpt2(WORDS, 512)


def _small() -> NanoGPT:
    return gpt2(FEW_WORDS, 64, layers=2, width=64, heads=4)


def _read(scale: Scale, seed: int) -> Sequences:
    train, test, _ = read_word_sequences(scale.length, scale.vocabulary)
    found, ids = [], []
    for what, words, count in zip(("train", "test"), (train, test), scale.size, strict=True):
        chosen = choose(count, len(words), seed, what)
        found.append(words[chosen])
        ids.append(tuple(f"{what}-{k}" for k in chosen))
    return Sequences(found[0], found[1], ids[0], ids[1], {})


setting = SequenceSetting(
    name="wikitext2-gpt2",
    title="WikiText-2 by words (Merity et al. 2016, CC BY-SA 3.0)",
    read=_read,
    full=Scale(
        size=(4054, 476),
        length=512,
        vocabulary=WORDS,
        model="GPT-2's shape, 12 layers of width 768, 12 heads",
        build=_full,
        recipe=Recipe(
            epochs=6,
            batch=16,
            learning_rate=6e-4,
            weight_decay=0.1,
            optimizer="adamw",
            betas=(0.9, 0.95),
            warmup=200,
            keep=(1, 2, 4, 6),
            clip=1.0,
        ),
    ),
    small=Scale(
        size=(200, 40),
        length=64,
        vocabulary=FEW_WORDS,
        model="GPT-2's shape, 2 layers of width 64, 4 heads",
        build=_small,
        recipe=Recipe(
            epochs=10,
            batch=20,
            learning_rate=3e-3,
            weight_decay=0.1,
            optimizer="adamw",
            betas=(0.9, 0.95),
            warmup=10,
            keep=(1, 3, 6, 10),
            clip=1.0,
        ),
    ),
    damping=0.1,
)
"""4054 and 476 sequences of 512 words with a network of 111,006,720 parameters, from scratch."""
