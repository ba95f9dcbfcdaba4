"""A criterion in the model's outputs: its slope at a label drawn from the model, and its curvature.

Axes: B examples, K columns of a factor, V classes. What is done for one distribution of V classes
is done for any leading axes ``...``, such as examples and positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dattri_core.errors import InputError, NumericsError

LARGEST_HESSIAN = 1024
"""Outputs of one example up to which the Hessian of a criterion is formed."""
GROUP = 256
"""Classes of a group."""
_PICKED = {"cpu": 2**22}  # probabilities in float64 at once: 32 MiB stay in a cache
_PICKED_ELSEWHERE = 2**26
_TOLERANCE = {torch.float64: 1e-8}


def softmax_sample(logits: Tensor, weight: Tensor, uniform: Tensor) -> Tensor:
    """Return d (-log p_y) / d logits = p - e_y for a label y drawn from p = softmax(logits).

    Its mean over labels is 0, its second moment the Hessian diag(p) - p p^T.

    Args:
        logits: ``[..., V]``.
        weight: Weight of the Hessian, ``[...]``; the slope is multiplied by its root.
        uniform: Numbers in [0, 1), ``[...]``; each picks a label by the inverse of the distribution
            function.
    """
    slope = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    flat, numbers = slope.flatten(0, -2), uniform.to(slope.device).flatten()
    most = _PICKED.get(slope.device.type, _PICKED_ELSEWHERE)
    step = max(1, most // max(1, slope.shape[-1]))
    picked = [
        _pick(flat[start : start + step], numbers[start : start + step])
        for start in range(0, len(flat), step)
    ]
    flat.scatter_add_(-1, torch.cat(picked), flat.new_full((len(flat), 1), -1.0))
    weighted = torch.empty_like(logits)
    return torch.mul(slope, weight.to(slope.dtype).sqrt().unsqueeze(-1), out=weighted)


def _pick(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return the label ``[N, 1]`` at which the distribution function passes each number.

    Of many classes groups are added up first, and the sum runs over one group: of tens of thousands
    of tokens, hardly more than a reading.
    """
    count, classes = probabilities.shape
    if classes <= GROUP:
        reached = probabilities.double().cumsum(-1)
        wanted = (uniform.double() * reached[:, -1]).unsqueeze(-1)
        return torch.searchsorted(reached, wanted, right=True).clamp_max(classes - 1)
    whole = classes // GROUP * GROUP
    groups = probabilities[:, :whole].reshape(count, -1, GROUP).sum(-1, dtype=torch.float64)
    rest = probabilities[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
    ends = torch.cat([groups, rest], 1).cumsum(-1)
    wanted = (uniform.double() * ends[:, -1]).unsqueeze(-1)
    group = torch.searchsorted(ends, wanted, right=True).clamp_max(ends.shape[1] - 1)
    start = torch.nn.functional.pad(ends, (1, 0)).gather(1, group)
    within = group * GROUP + torch.arange(GROUP, device=group.device)
    inside = probabilities.gather(1, within.clamp_max(classes - 1)).double()
    reached = start + inside.masked_fill_(within >= classes, 0.0).cumsum(-1)
    found = torch.searchsorted(reached, wanted, right=True).clamp_max(GROUP - 1)
    return (group * GROUP + found).clamp_max(classes - 1)


def softmax_factor(logits: Tensor, weight: Tensor) -> Tensor:
    """Return V - 1 columns f_k with sum_k f_k f_k^T = weight (diag(p) - p p^T), p = softmax.

    They are the Cholesky factor in closed form: with s_k = p_k + p_{k+1} + ..., column k is
    sqrt(p_k s_{k+1} / s_k) at k, -p_i sqrt(p_k / (s_k s_{k+1})) at i > k, and 0 before. It has one
    column fewer than the factor sqrt(p_k) (e_k - p), and is computed from logarithms, so that it
    is exact to rounding however sure the model is.

    Args:
        logits: ``[..., V]``.
        weight: ``[...]``, not negative.

    Returns:
        ``[V - 1, ..., V]``.

    Source: Tanabe and Sagae, "An exact Cholesky decomposition and the generalized inverse of the
    variance-covariance matrix of the multinomial distribution", J. R. Stat. Soc. B 54 (1992).
    """
    log_p = _wide(logits).log_softmax(-1)
    rest = log_p.flip(-1).logcumsumexp(-1).flip(-1)  # log s_k
    here, after = rest[..., :-1], rest[..., 1:]
    classes = log_p.shape[-1]
    nothing = log_p == float("-inf")  # a class that is masked out; else logarithms cancel as nan
    scale = ((log_p[..., :-1] - here - after) / 2).movedim(-1, 0).unsqueeze(-1)
    below = -(log_p + scale).exp()  # [V - 1, ..., V]
    above = torch.ones(classes - 1, classes, dtype=torch.bool, device=logits.device).tril()
    above = above.reshape(classes - 1, *([1] * (log_p.dim() - 1)), classes)
    factor = below.masked_fill(nothing, 0.0).masked_fill(above, 0.0)
    diagonal = ((log_p[..., :-1] - here + after) / 2).exp()
    diagonal = diagonal.masked_fill(nothing[..., :-1] | (after == float("-inf")), 0.0)
    torch.diagonal(factor, dim1=0, dim2=-1).copy_(diagonal)
    return (factor * weight.to(factor.dtype).sqrt().unsqueeze(-1)).to(logits.dtype)


def normal_sample(outputs: Tensor, uniform: Tensor) -> Tensor:
    """Return d 1/2 |o - y|^2 / d o = o - y for y drawn from N(o, 1): standard normal numbers.

    Args:
        outputs: ``[B, ...]``.
        uniform: Numbers in [0, 1) of the same shape.
    """
    numbers: Tensor = torch.special.ndtri(uniform.double().clamp_min(2.0**-54))
    return numbers.to(outputs.device, outputs.dtype)


def identity_factor(outputs: Tensor) -> Tensor:
    """Return the columns of the identity for each example, ``[K, B, ...]``, K outputs of one."""
    shape = outputs.shape[1:]
    size = shape.numel()
    eye = torch.eye(size, dtype=outputs.dtype, device=outputs.device)
    return eye.reshape(size, 1, *shape).expand(size, *outputs.shape)


def hessian_factor(criterion: Callable[[Tensor], Tensor], outputs: Tensor, name: str) -> Tensor:
    """Return columns f_k with sum_k f_k f_k^T = C_b, the Hessian of any criterion in the outputs.

    C_b = V diag(l) V^T is formed by one derivative of the slope for each output, and the columns
    are sqrt(l_k) v_k; those of an eigenvalue that is 0 to rounding are exactly 0.

    Args:
        criterion: Outputs ``[B, ...]`` to one number per example ``[B]``; must not mix examples.
        outputs: ``[B, ...]``.
        name: Of the loss, for messages.

    Returns:
        ``[K, B, ...]`` with K the outputs of one example.

    Raises:
        InputError: An example has more than 1024 outputs.
        NumericsError: C_b has an eigenvalue below 0, so that no such columns exist.
    """
    size = outputs.shape[1:].numel()
    if size > LARGEST_HESSIAN:
        raise InputError(
            f"factor of the criterion of the loss {name!r}: an example has {size} outputs, and the "
            f"Hessian in them is formed up to {LARGEST_HESSIAN}; give its factor in closed form: "
            "dattri.Loss(..., factor=lambda outputs, batch: ...), or use a curvature of products "
            "('ggn') or of drawn labels"
        )
    hessian = _output_hessian(criterion, outputs)
    values, vectors = torch.linalg.eigh(hessian)
    largest = values.abs().amax(-1, keepdim=True)
    rounding = torch.finfo(outputs.dtype).eps
    allowed = _TOLERANCE.get(outputs.dtype, 1e-3) * largest + rounding
    wrong = (values < -allowed).any(-1).nonzero().flatten().tolist()
    if wrong:
        raise NumericsError(
            f"factor of the criterion of the loss {name!r}: its Hessian in the outputs has the "
            f"eigenvalue {float(values[wrong[0], 0]):.3g} at example {wrong[0]} of a batch "
            f"({len(wrong)} of {len(values)} have one below 0), so the GGN is no sum of squares; "
            "give a criterion that is convex in the outputs (logits, not probabilities), or use "
            "the curvature 'hessian'"
        )
    kept = values > size * rounding * largest
    columns: Tensor = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    columns = columns.masked_fill(~kept.unsqueeze(-2), 0.0)  # [B, outputs, K]
    return columns.permute(2, 0, 1).reshape(size, *outputs.shape).to(outputs.dtype)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of the label, p = softmax(logits): exact where p rounds to 0 or 1.

    Args:
        logits: ``[..., V]``.
        labels: ``[...]``, each a class.
    """
    picked = labels.unsqueeze(-1)
    rest = logits.scatter(-1, picked, float("-inf")).logsumexp(-1)
    return logits.gather(-1, picked).squeeze(-1) - rest


def _output_hessian(criterion: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    """Return C_b in float64, ``[B, K, K]``."""
    count, size = len(outputs), outputs.shape[1:].numel()
    with torch.inference_mode(False), torch.enable_grad():
        free = outputs.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(
            criterion(free).sum(), free, create_graph=True, materialize_grads=True
        )
        rows = []
        for entry in slope.reshape(count, size).unbind(1):  # outputs may be [B]: one each
            row = torch.zeros_like(free)
            if entry.requires_grad:  # else the criterion is linear in this output
                (row,) = torch.autograd.grad(
                    entry.sum(), free, retain_graph=True, materialize_grads=True
                )
            rows.append(row.reshape(count, size).double())
    hessian = torch.stack(rows, 1)
    return (hessian + hessian.mT) / 2


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
