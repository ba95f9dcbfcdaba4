"""Orders of examples, of one seed in common or not; and how long parts of a train set train."""

import attrs
import numpy as np
import pytest
import torch
from dattri_parts.training import ModelRetraining, Optimum, Recipe
from dattri_parts.training.orders import orders
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dattri_core import Counterfactual, InputError

N = 23


def model():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def retraining(order="own", together=1, recipe=None, length="epochs"):
    generator = torch.Generator().manual_seed(0)
    train = (
        torch.randn(N, 4, generator=generator, dtype=torch.float64),
        torch.randint(2, (N,), generator=generator),
    )
    return ModelRetraining(
        model,
        recipe or Recipe(epochs=3, batch=5, learning_rate=0.3, momentum=0.5),
        "cross-entropy",
        train,
        train,
        ("loss",),
        together=together,
        order=order,
        length=length,
    )


def without(*left_out, seed=0):
    mask = np.ones(N, dtype=bool)
    mask[list(left_out)] = False
    return Counterfactual(mask, seed)


@given(mask=st.lists(st.booleans(), min_size=2, max_size=12).filter(any), seed=st.integers(0, 99))
def test_the_last_ones_take_the_places_of_those_left_out(mask, seed):
    index = torch.tensor(mask).nonzero().flatten()
    everything = orders(torch.arange(len(mask)), seed)
    shared, own = orders(index, seed, len(mask)), orders(index, seed)
    for _ in range(3):
        whole = next(everything).tolist()
        spare = [at for at in whole[len(index) :] if mask[at]]
        want = [at if mask[at] else spare.pop(0) for at in whole[: len(index)]]
        assert next(shared).tolist() == want
        assert spare == []
        assert sorted(next(own).tolist()) == index.tolist()


def batches_of(made, counterfactual):
    return [point.step.batch.tolist() for point in made.steps(counterfactual)]


def test_a_training_without_an_example_has_the_batches_of_the_whole_but_for_one_example():
    shared, own = retraining("shared"), retraining("own")
    whole = batches_of(shared, without())
    assert whole == batches_of(own, without())  # of all examples the two are the same
    places = set()
    for left_out in range(N):
        found = batches_of(shared, without(left_out))
        assert len(found) == len(whole)
        for epoch in range(3):
            steps = slice(5 * epoch, 5 * epoch + 5)
            pairs = list(zip(whole[steps], found[steps], strict=True))
            changed = [at for at, (before, after) in enumerate(pairs) if before != after]
            moved = pairs[-1][0][-1]  # the last one of the epoch
            assert pairs[-1][1] == [at for at in pairs[-1][0] if at != moved] or changed == [4]
            for before, after in pairs[:-1]:
                assert after == [moved if at == left_out else at for at in before]
            places.update(changed)
    assert places == set(range(5))
    assert batches_of(own, without(3))[:5] != batches_of(shared, without(3))[:5]
    assert batches_of(shared, without(3, seed=1)) != batches_of(shared, without(3))


def test_stacks_read_in_the_same_order():
    plan = [without(), *(without(i) for i in range(4)), without(2, seed=5)]
    one = list(retraining("shared").train(plan))
    many = list(retraining("shared", together=6).train(plan))
    for left, right in zip(one, many, strict=True):
        assert all((left[name] - right[name]).abs().max() < 1e-12 for name in left)


def test_an_order_is_part_of_what_outcomes_depend_on():
    own, shared = retraining("own"), retraining("shared")
    assert own.fingerprint != shared.fingerprint
    assert attrs.evolve(shared, order="own").fingerprint == own.fingerprint


def test_orders_that_there_are_not_are_refused():
    with pytest.raises(InputError, match=r"no order named 'same'.*'shared'"):
        retraining("same")
    with pytest.raises(InputError, match="reads all examples at once"):
        retraining("shared", recipe=Optimum(0.1))


# --- lengths --------------------------------------------------------------------------------------
@given(
    whole=st.integers(1, 90),
    part=st.integers(1, 90),
    batch=st.integers(1, 30),
    epochs=st.integers(1, 9),
    data=st.data(),
)
def test_a_part_takes_the_steps_of_the_whole_to_its_next_epoch(whole, part, batch, epochs, data):
    part = min(part, whole)
    keep = tuple(sorted(data.draw(st.sets(st.integers(1, epochs)))))
    recipe = Recipe(epochs=epochs, batch=batch, learning_rate=0.1, keep=keep, warmup=3)
    lasting = recipe.lasting(whole, part)
    steps, wanted = lasting.epochs * lasting.steps(part), epochs * recipe.steps(whole)
    assert wanted <= steps < wanted + lasting.steps(part)
    assert attrs.evolve(lasting, epochs=epochs, keep=keep) == recipe
    for before, after in zip(keep, lasting.keep, strict=True):
        assert (before / epochs) <= after / lasting.epochs < (before / epochs) + 1 / lasting.epochs
    assert recipe.lasting(whole, whole) == recipe


def test_trainings_of_one_length_take_as_many_steps():
    half = Counterfactual(np.arange(N) % 2 == 0, 0)  # 12 of 23: 3 steps an epoch for 5
    short, long = retraining(), retraining(length="steps")
    counts = [len(made.steps(half)) - 1 for made in (short, long)]
    assert counts == [3 * 3, 5 * 3]
    assert batches_of(long, half)[:9] == batches_of(short, half)[:9]
    assert batches_of(long, without()) == batches_of(short, without())
    by_hand = retraining(recipe=attrs.evolve(short.recipe, epochs=5))
    found, want = long.run(half, keep=(2, 5)), by_hand.run(half, keep=(2, 5))
    assert found.epochs == want.epochs == (2, 5)
    for name, tensor in want.states[-1].items():
        assert torch.equal(found.states[-1][name], tensor)
    with pytest.raises(InputError, match="epochs from 1 to 5"):
        long.run(half, keep=(6,))


def test_stacks_of_several_sizes_last_as_long_as_one_by_one():
    masks = [np.arange(N) % 2 == 0, np.arange(N) % 3 == 0, np.arange(N) < 12, np.ones(N, bool)]
    plan = [Counterfactual(mask, seed) for seed, mask in enumerate(masks)]
    one = list(retraining(length="steps").train(plan))
    many = list(retraining(length="steps", together=4).train(plan))
    short = list(retraining(together=4).train(plan))
    for left, right, other in zip(one, many, short, strict=True):
        assert all((left[name] - right[name]).abs().max() < 1e-12 for name in left)
        differ = max((left[name] - other[name]).abs().max() for name in left)
        assert (differ > 1e-3) == (other is not short[-1])


def test_a_length_is_part_of_what_outcomes_depend_on():
    prints = {retraining(length=length).fingerprint for length in ("epochs", "steps")}
    assert len(prints) == 2
    with pytest.raises(InputError, match=r"no length named 'step'.*'steps'"):
        retraining(length="step")
    with pytest.raises(InputError, match="length 'steps' is for a Recipe"):
        retraining(length="steps", recipe=Optimum(0.1))
