"""The methods relatif-explicit and relatif-ekfac: the influence functions they divide, divided."""

from __future__ import annotations

import pytest
import torch
from oracles.toy_tasks import cross_entropies, flat_gradients, positions, world

import dattri_core as dattri


@pytest.mark.parametrize("form", ["l", "theta"])
@pytest.mark.parametrize(
    ("name", "plain", "changes"),
    [
        ("relatif-explicit", "if-explicit", {"curvature": "ggn"}),
        ("relatif-ekfac", "if-ekfac", {}),
    ],
)
@pytest.mark.parametrize("memory", ["1MiB", None])
def test_scores_are_the_influences_over_the_size_of_the_train_row(
    form, name, plain, changes, memory
):
    task, train, test = world(40, 6)
    method = dattri.method(name, **{"scorer.form": form})
    got = method.attribute(task, train, test, memory=memory).values
    fitted = dattri.method(plain, **changes).fit(task, train)
    influence = fitted.attribute(test).values
    if form == "l":
        size = fitted.self_influence().sqrt()
    else:
        chain = fitted._held.chain
        order = positions(task.model, chain.source.space)
        g = flat_gradients(task.model, cross_entropies(train))[:, order]
        rows = dattri.Rows.from_flat(chain.source.space, g, torch.arange(len(g)))
        size = chain.test(rows).flat().norm(dim=1)
    assert (got - influence / size.unsqueeze(1)).abs().max() < 1e-9 * got.abs().max()
