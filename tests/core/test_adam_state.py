"""The state of Adam at a checkpoint: from an optimiser at work, from its file, by which names."""

import pickle

import attrs
import pytest
import torch
from oracles.adam import Tied, groups_of, sequences, tied, trained
from torch import nn

from dattri_core import AdamState, Checkpoint, InputError, NumericsError, StoreError, Task

BATCH = sequences(12, 1)


def same(got, want):
    assert set(got) == set(want)
    for name, own in want.items():
        assert torch.equal(got[name].first, own.first), name
        assert torch.equal(got[name].second, own.second), name
        facts = [(m.step, m.betas, m.epsilon) for m in (got[name], own)]
        assert facts[0] == facts[1], name


def saved(optimizer, path):
    torch.save(optimizer.state_dict(), path)
    return str(path)


def square(groups=None, steps=2):
    """Return a model of three square layers and its optimiser, whose shapes tell nothing apart."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))).double()
    given = groups(model) if groups else [{"params": list(model.parameters())}]
    optimizer = torch.optim.Adam(given, lr=0.1)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 3).double()).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_of_an_optimiser_at_work_it_is_a_copy_by_identity():
    model = tied()
    optimizer = trained(model, BATCH)
    found = AdamState.of(optimizer, model).load(model)
    kept = {name: (m.first.clone(), m.second.clone()) for name, m in found.items()}
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert "head.weight" not in found  # it is the embedding
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        assert torch.equal(found[name].first, state["exp_avg"])
        assert torch.equal(found[name].second, state["exp_avg_sq"])
        assert found[name].step == 3
        betas, epsilon = ((0.8, 0.95), 1e-8) if p.dim() > 1 else ((0.7, 0.9), 1e-6)
        assert (found[name].betas, found[name].epsilon) == (betas, epsilon)
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
    for name, (first, second) in kept.items():
        assert torch.equal(found[name].first, first)
        assert torch.equal(found[name].second, second)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_of_a_file_it_is_the_same(tmp_path, kind):
    model = tied()
    optimizer = trained(model, BATCH, kind)  # two groups, matrices and the rest, as trainers do
    path = saved(optimizer, tmp_path / "optimizer.pt")
    same(AdamState(path).load(model), AdamState.of(optimizer, model).load(model))
    single = kind(model.parameters())
    single.load_state_dict(_merged(optimizer, model))
    path = saved(single, tmp_path / "single.pt")
    same(AdamState(path).load(model), AdamState.of(single, model).load(model))


def _merged(optimizer, model):
    """Return the state dict of one group in the order of the model."""
    state = {at: optimizer.state[p] for at, p in enumerate(model.parameters())}
    group = {**optimizer.state_dict()["param_groups"][0], "params": list(state)}
    return {"state": state, "param_groups": [group]}


def test_it_is_read_when_it_is_used(tmp_path):
    state = AdamState(tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match="no file"):
        state.check(tied())
    model = tied()
    saved(trained(model, BATCH), tmp_path / "optimizer.pt")
    state.check(model)


def test_frozen_parameters_are_numbered_or_not(tmp_path):
    for everything in (True, False):
        model = tied()
        model.hidden.requires_grad_(False)
        optimizer = trained(model, BATCH)
        if everything:
            optimizer = torch.optim.AdamW(model.parameters())
            loss = model(BATCH[0]).logsumexp(1).sum()
            loss.backward()
            optimizer.step()
        path = saved(optimizer, tmp_path / f"{everything}.pt")
        found = AdamState(path).load(model)
        same(found, AdamState.of(optimizer, model).load(model))
        assert not any(name.startswith("hidden") for name in found)
        with pytest.raises(InputError, match=r"no moments of \['hidden.bias'\], which were never"):
            AdamState(path).check(model, ["hidden.bias", "gain"])
        model.hidden.requires_grad_(True)
        if not everything:
            with pytest.raises(InputError, match=r"numbers 6 parameters, the model has 8, of whi"):
                AdamState(path).check(model)


def halves(model):
    """Return groups whose members shapes do not tell: the last two layers, then the first."""
    return [{"params": list(model[1:].parameters())}, {"params": list(model[0].parameters())}]


def test_groups_that_shapes_leave_open_are_refused_and_names_settle_it(tmp_path):
    model, optimizer = square(groups=halves)
    path = saved(optimizer, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match=r"groups of \[4, 2\].*in several ways.*give names="):
        AdamState(path).check(model)
    names = [
        name
        for group in optimizer.param_groups
        for parameter in group["params"]
        for name, own in model.named_parameters()
        if own is parameter
    ]
    same(AdamState(path, names).load(model), AdamState.of(optimizer, model).load(model))
    turned = AdamState(path, names[::-1])
    with pytest.raises(InputError, match=r"moments of '0.bias' have shape \(3, 3\)"):
        turned.check(model)
    with pytest.raises(InputError, match="names= has 5 names, and the optimiser numbers 6"):
        AdamState(path, names[:5]).check(model)
    with pytest.raises(InputError, match=r"moments of \['lost'\], which Sequential does not have"):
        AdamState(path, ["lost", *names[1:]]).check(model)


def test_an_optimiser_that_kept_names_needs_no_shapes(tmp_path):
    def named(model):
        by_name = list(model.named_parameters())
        return [{"params": by_name[2:]}, {"params": by_name[:2]}]

    try:
        model, optimizer = square(groups=named)
    except TypeError:
        pytest.skip("this torch names no parameters of an optimiser")
    path = saved(optimizer, tmp_path / "optimizer.pt")
    same(AdamState(path).load(model), AdamState.of(optimizer, model).load(model))


def test_a_state_by_names_needs_no_numbers(tmp_path):
    model, optimizer = square(groups=halves)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [
        {**group, "params": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    state = {names[id(p)]: own for p, own in optimizer.state.items()}
    torch.save({"state": state, "param_groups": groups}, tmp_path / "whole.pt")
    found = AdamState(tmp_path / "whole.pt").load(model)
    same(found, AdamState.of(optimizer, model).load(model))


def test_shapes_of_another_model_are_refused(tmp_path):
    model, optimizer = square()
    path = saved(optimizer, tmp_path / "optimizer.pt")
    wider = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4), nn.Linear(4, 3))
    with pytest.raises(InputError, match=r"groups of \[6\] parameters fit .* in no way"):
        AdamState(path).check(wider)
    live = AdamState.of(optimizer, model)
    with pytest.raises(InputError, match=r"moments of '1.weight' have shape \(3, 3\), the model's"):
        live.check(wider)
    with pytest.raises(InputError, match=r"parameter of shape .* that Sequential does not have"):
        AdamState.of(optimizer, wider)


def test_a_task_looks_at_shapes_before_any_work(tmp_path):
    model, optimizer = square()
    path = saved(optimizer, tmp_path / "optimizer.pt")
    wider = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4), nn.Linear(4, 3))
    for state in (path, AdamState.of(optimizer, model)):
        task = Task(wider, "squared-error", optimisers=[state])
        with pytest.raises(InputError, match=r"fit the shapes|have shape"):
            task.checkpoints[0].check(wider)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (torch.optim.SGD, "SGD"),
        (torch.optim.RMSprop, "RMSprop"),
        (torch.optim.RAdam, "another optimiser"),
        (torch.optim.NAdam, "NAdam"),
        (torch.optim.Adamax, "Adamax"),
    ],
)
def test_other_optimisers_are_refused(tmp_path, kind, said):
    model = tied()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.01, **options)
    model(BATCH[0]).sum().backward()
    optimizer.step()
    with pytest.raises(InputError, match=f"got a {kind.__name__}, expected a torch.optim.Adam"):
        AdamState.of(optimizer, model)
    path = saved(optimizer, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match=f"it is the state of {said}, expected that of"):
        AdamState(path).check(model)


@pytest.mark.parametrize("choice", ["amsgrad", "maximize"])
def test_other_updates_of_adam_are_refused(tmp_path, choice):
    model = tied()
    optimizer = torch.optim.Adam(model.parameters(), **{choice: True})
    model(BATCH[0]).sum().backward()
    optimizer.step()
    for made in (
        lambda: AdamState.of(optimizer, model),
        lambda: AdamState(saved(optimizer, tmp_path / "o.pt")).check(model),
    ):
        with pytest.raises(InputError, match=f"{choice}=True, which is another update"):
            made()


class Runs:
    def __reduce__(self):
        return (print, ("it ran",))


def test_a_pickle_of_code_is_refused_and_never_runs(tmp_path, capsys):
    path = tmp_path / "optimizer.pt"
    torch.save({"state": {}, "param_groups": [], "more": Runs()}, path)
    with pytest.raises(StoreError, match=r"a pickle is never loaded.*torch\.save\(optimizer"):
        AdamState(path).check(tied())
    path.write_bytes(pickle.dumps(Runs()))
    with pytest.raises(StoreError, match="a pickle is never loaded"):
        AdamState(path).check(tied())
    path.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(StoreError, match="cannot be read"):
        AdamState(path).check(tied())
    torch.save(tied().state_dict(), path)
    with pytest.raises(StoreError, match="expected the 'state' and 'param_groups'"):
        AdamState(path).check(tied())
    assert "it ran" not in capsys.readouterr().out
    with pytest.raises(InputError, match=r"got a Adam; give AdamState\.of"):
        AdamState(torch.optim.Adam(tied().parameters()))


@pytest.mark.parametrize(("which", "bad"), [("first", torch.inf), ("second", torch.nan)])
def test_moments_that_are_not_finite_are_refused(which, bad):
    model = tied()
    found = AdamState.of(trained(model, BATCH), model).load(model)
    values = getattr(found["gain"], which).clone()
    values[2] = bad
    state = AdamState({**found, "gain": attrs.evolve(found["gain"], **{which: values})})
    state.check(model)
    with pytest.raises(NumericsError, match=f"the {which} moment of 'gain' is not finite"):
        state.load(model)
    values[2] = -1.0
    state = AdamState({**found, "gain": attrs.evolve(found["gain"], **{which: values})})
    if which == "first":
        state.load(model)
        return
    with pytest.raises(NumericsError, match="not finite or negative"):
        state.load(model)


def test_before_the_first_step_there_are_no_moments():
    model = tied()
    optimizer = torch.optim.Adam(groups_of(model))
    with pytest.raises(InputError, match=r"never updated; leave them out.*after the first step"):
        AdamState.of(optimizer, model).check(model, ["gain"])
    found = AdamState.of(trained(model, BATCH), model).load(model)
    early = AdamState({**found, "gain": attrs.evolve(found["gain"], step=0)})
    with pytest.raises(InputError, match=r"no moments of \['gain'\]"):
        early.check(model, ["gain", "norm.bias"])


def test_all_of_it_is_in_the_fingerprint(tmp_path):
    model = tied()
    found = AdamState.of(trained(model, BATCH), model).load(model)
    own = found["gain"]
    changed = [
        attrs.evolve(own, first=own.first + 1e-12),
        attrs.evolve(own, second=own.second * 2),
        attrs.evolve(own, step=own.step + 1),
        attrs.evolve(own, betas=(0.7, 0.91)),
        attrs.evolve(own, epsilon=1e-7),
    ]
    states = [AdamState(found), *(AdamState({**found, "gain": other}) for other in changed)]
    here = [Checkpoint("a", 0, 1, None, None, optimiser=s) for s in (None, *states)]
    assert len({c.fingerprint(model) for c in here}) == len(here)
    other = tied()
    assert AdamState.of(trained(other, BATCH), other).fingerprint == states[0].fingerprint
    path = tmp_path / "optimizer.pt"
    saved(trained(tied(), BATCH), path)
    one, named = AdamState(path).fingerprint, AdamState(path, ["a"]).fingerprint
    saved(trained(tied(), BATCH, steps=2), path)
    assert len({one, named, AdamState(path).fingerprint}) == 3


def test_a_tied_weight_may_have_any_of_its_names():
    model = tied()
    found = AdamState.of(trained(model, BATCH), model).load(model)
    renamed = {("head.weight" if n == "embedding.weight" else n): m for n, m in found.items()}
    same(AdamState(renamed).load(model), found)
    assert isinstance(model, Tied)


def test_the_trainer_of_hugging_face_writes_such_files(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    rows = [{"input_ids": torch.arange(6) + at, "labels": torch.arange(6) + at} for at in range(8)]
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path), max_steps=2, save_steps=2, weight_decay=0.1, report_to=[], use_cpu=True
        ),
        train_dataset=rows,
    )
    trainer.train()
    [path] = tmp_path.glob("checkpoint-*/optimizer.pt")
    found, live = AdamState(path).load(model), AdamState.of(trainer.optimizer, model).load(model)
    same(found, live)
    assert len(trainer.optimizer.param_groups) == 2
    assert set(found) == {name for name, _ in model.named_parameters()}
    task = Task(model, "causal-lm", checkpoints=str(path.parent), optimisers=[path])
    task.checkpoints[0].check(model, task.parameter_names)
