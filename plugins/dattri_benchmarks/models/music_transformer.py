"""The Music Transformer: attention that knows how far apart two events are."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def skew(x: Tensor) -> Tensor:
    """Turn distances into positions: y[..., i, j] = x[..., i, T - 1 - i + j] where j <= i.

    Column T - 1 - d of x, ``[..., T, T]``, belongs to distance d, so that y[i, j] is of distance
    i - j. Entries of y with j > i have no meaning. No sum or gather over T^2 pairs: a column of
    zeros before the first one shifts every row by one more than the row before when the
    numbers are laid out anew.

    Source: Huang et al. 2018, arXiv 1809.04281, section 3.4.1.
    """
    length = x.shape[-1]
    padded = nn.functional.pad(x, (1, 0))
    y: Tensor = padded.reshape(*x.shape[:-2], length + 1, length)[..., 1:, :]
    return y


class RelativeAttention(nn.Module):
    """softmax((Q K^T + S) / sqrt(d) + mask) V by head, with S_ij = q_i . e_(i - j).

    Written out, so that it has second derivatives and runs under ``vmap``.
    """

    mask: Tensor

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        self.register_buffer("mask", future, persistent=False)

    def forward(self, x: Tensor, distances: Tensor) -> Tensor:
        """Return ``[B, T, width]``.

        Args:
            x: ``[B, T, width]``.
            distances: ``[B, T, width]``, e of the distances T - 1 to 0, all heads side by side.
        """
        size, length, width = x.shape
        parts = self.mix(x).reshape(size, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, T, d]
        relative = distances.reshape(size, length, self.heads, -1).transpose(1, 2)
        weights = query @ key.mT + skew(query @ relative.mT)
        weights = weights * (width // self.heads) ** -0.5
        weights = weights.masked_fill(self.mask[:length, :length], float("-inf")).softmax(3)
        mixed = (weights @ value).transpose(1, 2).reshape(size, length, width)
        y: Tensor = self.out(mixed)
        return y


class MusicBlock(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(self, width: int, hidden: int, heads: int, length: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = RelativeAttention(width, heads, length)
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor, distances: Tensor) -> Tensor:
        """Return ``[B, T, width]``."""
        x = x + self.attention(self.attention_norm(x), distances)
        y: Tensor = x + self.feedforward(self.feedforward_norm(x))
        return y


class MusicTransformer(nn.Module):
    """See `music_transformer`."""

    positions: Tensor

    def __init__(
        self, vocabulary: int, length: int, layers: int, width: int, hidden: int, heads: int
    ) -> None:
        super().__init__()
        self.length = length
        self.token = nn.Embedding(vocabulary, width)
        self.distance = nn.Embedding(length, width)
        self.register_buffer("positions", sinusoids(length, width), persistent=False)
        self.blocks = nn.ModuleList(MusicBlock(width, hidden, heads, length) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # The sinusoids are of size 1, and events must not drown in them.
                std = 1.0 if name == "token.weight" else width**-0.5
                # What is added to the residual stream 2 layers times starts smaller (GPT-2).
                joins = name.endswith(("attention.out.weight", "feedforward.2.weight"))
                nn.init.normal_(parameter, std=std / (2 * layers) ** 0.5 if joins else std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token, ``[B, T, vocabulary]``, of ``tokens [B, T]``."""
        size, length = tokens.shape
        if length > self.length:
            raise ValueError(
                f"music_transformer: {length} tokens, and it was made for {self.length}"
            )
        far = torch.arange(length - 1, -1, -1, device=tokens.device)
        # Repeated for each example, so that the embedding's output has an axis of examples.
        distances = self.distance(far.expand(size, length))
        x = self.token(tokens) + self.positions[:length]
        for block in self.blocks:
            x = block(x, distances)
        logits: Tensor = self.head(self.norm(x))
        return logits


def sinusoids(length: int, width: int) -> Tensor:
    """Return sin and cos of t / 10000^(2k / width), ``[length, width]``, side by side.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5.
    """
    rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width].float()


def music_transformer(
    vocabulary: int = 388,
    length: int = 512,
    layers: int = 6,
    width: int = 512,
    hidden: int = 1024,
    heads: int = 8,
) -> MusicTransformer:
    """Return a causal transformer with relative attention, 13,277,572 parameters as it stands.

    Each head has a vector for each distance between two events, as published; here all layers share
    them, where the publication has some for each. Norms come before their layers, and there is no
    dropout. Every weight belongs to a linear layer, a layer norm or an embedding.

    Source: Huang et al. 2018, arXiv 1809.04281, section 3.

    Args:
        vocabulary: Distinct tokens.
        length: Tokens of the longest sequence.
        layers: Blocks.
        width: Of the residual stream.
        hidden: Of the networks between the attentions.
        heads: Of the attention; divides the width.
    """
    if width % heads:
        raise ValueError(f"music_transformer: the width {width} is not a multiple of {heads} heads")
    return MusicTransformer(vocabulary, length, layers, width, hidden, heads)
