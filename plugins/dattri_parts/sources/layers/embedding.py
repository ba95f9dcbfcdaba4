"""Embeddings: one-hot inputs that stay indices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from attrs import frozen
from torch import Tensor, nn

from dattri_core import Block, BlockSpec, InputError, OneHot, OuterBlock, ParameterView
from dattri_parts.sources.layers.affine import dtype_of


@frozen
class EmbeddingRule:
    """``nn.Embedding``: dL/dW^T = sum_t g_t onehot(i_t)^T; the row of ``padding_idx`` gets none.

    The block is (D, V), the transpose of the weight ``[V, D]``. Whether the optimizer would have
    been given a sparse gradient changes nothing.
    """

    leading: ClassVar[bool] = False

    def spec(self, name: str, module: nn.Module, trained: Mapping[str, str]) -> BlockSpec | None:
        """Return the outer block (D, V); None when gradients are scaled by an index's frequency."""
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            raise InputError(
                f"per-example: the embedding {name!r} has max_norm={module.max_norm}, which "
                "rewrites its weights during a forward pass; apply the limit once to the weights "
                "and set max_norm=None"
            )
        if module.scale_grad_by_freq or set(trained) != {"weight"}:
            return None
        shape = (module.embedding_dim, module.num_embeddings)
        view = ParameterView(trained["weight"], (shape[1], shape[0]), 0, shape[1], transposed=True)
        return BlockSpec(name, "outer", shape, (view,))

    def rows(
        self, module: nn.Module, trained: Mapping[str, str], inputs: Tensor, grads: Tensor
    ) -> Block:
        """Return output gradients and indices."""
        assert isinstance(module, nn.Embedding)
        index = inputs.reshape(len(inputs), -1).long()
        grads = grads.reshape(*index.shape, -1).to(dtype_of(module, trained))
        if module.padding_idx is not None:
            grads = grads.masked_fill((index == module.padding_idx).unsqueeze(2), 0)
        return OuterBlock(grads, OneHot(index, module.num_embeddings))
