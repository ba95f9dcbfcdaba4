"""A small GPT on characters: a causal transformer of linear layers, layer norms and embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CausalAttention(nn.Module):
    """softmax(Q K^T / sqrt(d) + mask) V by head, written out.

    Fused attention kernels have no second derivative; these products do, and run under ``vmap``.
    """

    mask: Tensor

    def __init__(self, width: int, heads: int, length: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.mix = nn.Linear(width, 3 * width, bias)
        self.out = nn.Linear(width, width, bias)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        self.register_buffer("mask", future, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, T, width]``; position t sees positions up to t."""
        size, length, width = x.shape
        parts = self.mix(x).reshape(size, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, T, d]
        weights = query @ key.mT * (width // self.heads) ** -0.5
        weights = weights.masked_fill(self.mask[:length, :length], float("-inf")).softmax(3)
        mixed = (weights @ value).transpose(1, 2).reshape(size, length, width)
        y: Tensor = self.out(mixed)
        return y


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(self, width: int, heads: int, length: int, bias: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=bias)
        self.attention = CausalAttention(width, heads, length, bias)
        self.feedforward_norm = nn.LayerNorm(width, bias=bias)
        self.feedforward = nn.Sequential(
            nn.Linear(width, 4 * width, bias), nn.GELU(), nn.Linear(4 * width, width, bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, T, width]``."""
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.feedforward(self.feedforward_norm(x))
        return y


class NanoGPT(nn.Module):
    """See `nano_gpt`."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        layers: int,
        width: int,
        heads: int,
        bias: bool,
        tied: bool,
    ) -> None:
        super().__init__()
        self.length = length
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, length, bias) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.token.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # What is added to the residual stream 2 layers times starts smaller (GPT-2).
                joins = name.endswith(("attention.out.weight", "feedforward.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if joins else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token, ``[B, T, vocabulary]``, of ``tokens [B, T]``."""
        size, length = tokens.shape
        if length > self.length:
            raise ValueError(f"nano_gpt: {length} tokens, and it was made for {self.length}")
        # Repeated for each example, so that the embedding's output has an axis of examples.
        places = torch.arange(length, device=tokens.device).expand(size, length)
        x = self.token(tokens) + self.position(places)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def nano_gpt(
    vocabulary: int = 65,
    length: int = 256,
    layers: int = 6,
    width: int = 384,
    heads: int = 6,
    *,
    bias: bool = True,
    tied: bool = False,
) -> NanoGPT:
    """Return a causal transformer on ``[B, T]`` tokens, 10,795,776 parameters as it stands.

    Pre-norm blocks of attention and a GELU network of four times the width, learned positions, no
    dropout. Every weight belongs to a linear layer, a layer norm or an embedding. Without biases
    and tied it is nanoGPT's network for Shakespeare characters, of 10,745,088 parameters.

    Source: Radford et al. 2019 (GPT-2); the sizes of nanoGPT's network for Shakespeare characters.

    Args:
        vocabulary: Distinct tokens.
        length: Tokens of the longest sequence.
        layers: Blocks.
        width: Of the residual stream.
        heads: Of the attention; divides the width.
        bias: Whether linear layers (but the head) and norms have one.
        tied: Whether the head's weight is the embedding's.
    """
    if width % heads:
        raise ValueError(f"nano_gpt: the width {width} is not a multiple of {heads} heads")
    return NanoGPT(vocabulary, length, layers, width, heads, bias, tied)


def gpt2(
    vocabulary: int = 50257, length: int = 1024, layers: int = 12, width: int = 768, heads: int = 12
) -> NanoGPT:
    """Return GPT-2's network on ``[B, T]`` tokens, 124,439,808 parameters as it stands.

    See `nano_gpt`: with biases, and a head whose weight is the embedding's.

    Source: Radford et al. 2019, the smallest of its sizes.
    """
    return nano_gpt(vocabulary, length, layers, width, heads, bias=True, tied=True)
