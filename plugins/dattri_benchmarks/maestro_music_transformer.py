"""The setting ``maestro-music-transformer``: piano performances and the Music Transformer."""

from __future__ import annotations

from dattri_parts.training import Recipe

from dattri_benchmarks.maestro import read_event_sequences
from dattri_benchmarks.models import MusicTransformer, music_transformer
from dattri_benchmarks.performance import EVENTS
from dattri_benchmarks.sequences import Scale, Sequences, SequenceSetting


def _full() -> MusicTransformer:
    return music_transformer(EVENTS, 512)


def _small() -> MusicTransformer:
    return music_transformer(EVENTS, 64, layers=2, width=64, hidden=128, heads=4)


def _read(scale: Scale, seed: int) -> Sequences:
    train, train_ids, source = read_event_sequences("train", scale.length, scale.size[0], seed)
    test, test_ids, _ = read_event_sequences("test", scale.length, scale.size[1], seed)
    return Sequences(train, test, tuple(train_ids), tuple(test_ids), {"archive": source})


setting = SequenceSetting(
    name="maestro-music-transformer",
    title="MAESTRO v2.0.0 (Hawthorne et al. 2019, CC BY-NC-SA 4.0)",
    read=_read,
    full=Scale(
        size=(5000, 178),
        length=512,
        vocabulary=EVENTS,
        model="Music Transformer, 6 layers of width 512, 8 heads",
        build=_full,
        recipe=Recipe(
            epochs=20,
            batch=32,
            learning_rate=5e-4,
            weight_decay=0.01,
            optimizer="adamw",
            betas=(0.9, 0.98),
            warmup=200,
            keep=(1, 3, 6, 10, 15, 20),
            clip=1.0,
        ),
    ),
    small=Scale(
        size=(200, 40),
        length=64,
        vocabulary=EVENTS,
        model="Music Transformer, 2 layers of width 64, 4 heads",
        build=_small,
        recipe=Recipe(
            epochs=15,
            batch=20,
            learning_rate=3e-3,
            weight_decay=0.01,
            optimizer="adamw",
            betas=(0.9, 0.98),
            warmup=10,
            keep=(2, 5, 10, 15),
            clip=1.0,
        ),
    ),
    damping=0.1,
)
"""5000 and 178 sequences of 512 events with the network of 13,277,572 parameters."""
