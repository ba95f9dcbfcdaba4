"""TRAK in closed form, float64: gradients by torch.func of margins spelled out from p."""

import torch
from torch.func import functional_call, grad, vmap


def probability(logits, label):
    return logits.softmax(-1).gather(-1, label.unsqueeze(-1)).squeeze(-1)


def label_margin(outputs, label):
    """Return log p - log(1 - p) of one label, and 1 - p."""
    p = probability(outputs, label)
    return p.log() - (1 - p).log(), 1 - p


def sequence_margin(outputs, labels):
    """Return the sum over the next tokens of log p - log(1 - p), and the mean of 1 - p."""
    total, rest, count = 0.0, 0.0, 0
    for t in range(1, len(labels)):
        p = probability(outputs[t - 1], labels[t].clamp_min(0))
        known = labels[t] != -100
        total = total + torch.where(known, p.log() - (1 - p).log(), 0.0)
        rest = rest + torch.where(known, 1 - p, 0.0)
        count = count + known
    return total, rest / count


def features(model, inputs, labels, margin=label_margin):
    """Return the gradients of the margins ``[n, d]``, the model's flat order, and 1 - p ``[n]``."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def value(given, x, y):
        return margin(functional_call(model, given, (x.unsqueeze(0),))[0], y)

    rows = vmap(grad(lambda *a: value(*a)[0]), (None, 0, 0))(weights, inputs, labels)
    rest = vmap(lambda x, y: value(weights, x, y)[1])(inputs, labels)
    return torch.cat([g.flatten(1) for g in rows.values()], 1).detach(), rest.detach()


def published(members, threshold=0.0):
    """Return [1/M sum Q_m] [1/M sum Phi_m (Phi_m^T Phi_m + r I)^-1 phi_m(z)], ``[n, m]``.

    Args:
        members: For each checkpoint Phi ``[n, K]``, Q ``[n]``, phi of the tests ``[m, K]``, r.
        threshold: Of the last step.
    """
    weights, products = 0.0, 0.0
    for train, weight, test, ridge in members:
        gram = train.T @ train + ridge * torch.eye(train.shape[1], dtype=train.dtype)
        products = products + train @ torch.linalg.solve(gram, test.T) / len(members)
        weights = weights + weight / len(members)
    scores = weights[:, None] * products
    return torch.where(scores.abs() > threshold, scores - threshold * scores.sign(), 0.0)
