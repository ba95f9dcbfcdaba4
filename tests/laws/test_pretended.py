"""The pretended device: the numbers of the CPU, the rules of a GPU."""

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap
from toy_row_parts import ToyProjector

from dattri_core.laws import check, pretended
from dattri_core.laws.pretended import NAME, accelerator, prepare

pytestmark = pytest.mark.skipif(bool(prepare()), reason=prepare())


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B, ONE, AT = normal(4, 3), normal(4, 3, seed=1), normal(4, 1, seed=2), torch.tensor([0, 2, 3])

# What parts do to tensors: views, writes in place, positions, masks, algebra, what makes tensors.
STEPS = {
    "view": lambda a, b, i: a.T.reshape(4, 3)[1:].flatten(),
    "write": lambda a, b, i: a[1:3].mul_(b[1:3]).add_(1).sum() + a,
    "set": lambda a, b, i: a.index_put((i,), b[:3]) + a.index_add(0, i, b[:3]),
    "mask": lambda a, b, i: a.masked_fill(b > 0, 0.0) + a.where(b > 0, a.new_zeros(())),
    "pick": lambda a, b, i: a[(b > 0).any(1).nonzero().squeeze(1)] @ b.T,
    "out": lambda a, b, i: torch.addcmul(a, b, b[:, :1], out=torch.empty_like(a)),
    "make": lambda a, b, i: a + torch.arange(3, device=a.device) + torch.eye(4, 3, device=a.device),
    "sort": lambda a, b, i: a.sort(0).values + b.cumsum(0) + a.argsort(1),
    "solve": lambda a, b, i: torch.linalg.cholesky(a @ a.T + torch.eye(4).to(a)) @ b,
    "turn": lambda a, b, i: torch.linalg.eigh(a @ a.T)[0],
    "cast": lambda a, b, i: (a.float() @ b.float().T).double(),
    "list": lambda a, b, i: torch.stack([a, b]).sum(0) + torch.cat([a, b])[::2].repeat(1, 1),
    "drawn": lambda a, b, i: a + torch.zeros(4, 3, device=a.device, dtype=a.dtype),
    "softmax": lambda a, b, i: a.log_softmax(1).exp() + nn.functional.one_hot(i, 4)[:, :3].sum(),
}


@settings(deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4))
def test_what_it_computes_is_what_the_cpu_computes(names):
    near, far = (A.clone(), B.clone(), AT), (A.to(NAME), B.to(NAME), AT.to(NAME))
    for name in names:
        want, got = STEPS[name](*near), STEPS[name](*far)
        assert got.device.type == NAME
        assert torch.equal(got.cpu(), want), name
    for left, right in zip(near, far, strict=True):
        assert torch.equal(right.cpu(), left)  # written in place


class Net(nn.Module):
    """Embeds, attends, normalises and convolves."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.mix = nn.Linear(4, 12)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        hidden = self.embed(tokens)
        query, key, value = self.mix(hidden).chunk(3, -1)
        hidden = self.norm(hidden + (query @ key.mT).softmax(-1) @ value)
        return self.head(torch.tanh(self.conv(hidden.mT)).mean(2))


def derivatives(net, device):
    """Return gradients of single examples, products from both sides, and a Hessian."""
    tokens, labels = torch.arange(42).reshape(6, 7) % 5, torch.arange(6) % 3
    weights = {name: p.detach().to(device) for name, p in net.named_parameters()}
    x, y = tokens.to(device), labels.to(device)

    def loss(weights, x, y):
        return nn.functional.cross_entropy(functional_call(net, weights, (x,)), y)

    def at_head(head):
        return loss({**weights, "head.weight": head}, x, y)

    one = vmap(grad(lambda w, x, y: loss(w, x[None], y[None])), (None, 0, 0))(weights, x, y)
    ahead = jvp(lambda w: grad(loss)(w, x, y), (weights,), (weights,))[1]
    number = torch.ones((), device=device, dtype=torch.float64)
    back = vjp(lambda w: loss(w, x, y), weights)[1](number)[0]
    return [
        *one.values(),
        *ahead.values(),
        *back.values(),
        hessian(at_head)(net.head.weight.to(x.device)),
    ]


def test_models_and_transforms_work_on_it():
    net = Net().double()
    found = [derivatives(net, device) for device in ("cpu", NAME)]
    for want, got in zip(*found, strict=True):
        assert got.device.type == NAME
        torch.testing.assert_close(got.cpu(), want, rtol=1e-12, atol=1e-14)
    net.to(NAME)
    net(torch.zeros(2, 7, dtype=torch.long, device=NAME)).square().sum().backward()
    assert net.head.weight.grad.device.type == NAME


@pytest.mark.parametrize(
    "mixed",
    [
        lambda far: far + B,
        lambda far: far @ B.T,
        lambda far: B.add_(far),
        lambda far: torch.cat([far, B]),
        lambda far: torch.stack([far.sum(), torch.zeros(())]),  # no pointwise operation
        lambda far: far.index_add_(0, AT, far[:3]),
        lambda far: far.index_put_((AT,), B[:3]),
        lambda far: B[AT.to(NAME)],
        lambda far: torch.randn(3, device=NAME, generator=torch.Generator()),
        lambda far: nn.Linear(3, 2).double()(far),
    ],
)
def test_it_does_not_mix_with_the_cpu(mixed):
    with pytest.raises(RuntimeError, match=r"same device|generator"):
        mixed(A.to(NAME))


def test_it_takes_what_a_gpu_takes():
    far = A.to(NAME)
    assert torch.equal((far * torch.tensor(2.0)).cpu(), A * 2)  # one number
    assert torch.equal(far[AT].cpu(), A[AT])  # positions
    far[AT] = torch.tensor(1.0).double()
    assert far[2, 1].item() == 1.0
    assert far.tolist()[2] == [1.0] * 3
    near = B.clone()
    near.copy_(far)
    assert torch.equal(near, far.cpu())
    with pytest.raises(TypeError, match=r"use \.cpu\(\) first"):
        far.numpy()
    with pytest.raises(NotImplementedError, match="was resized"):
        torch.add(far, far, out=torch.empty(0, device=NAME, dtype=far.dtype))


def test_a_part_that_stays_on_the_cpu_breaks_the_law():
    report = check("projector", ToyProjector("home"))
    (failure,) = report.failures
    assert failure.law == "device-does-not-show"
    assert "expected all tensors to be on the same device" in failure.detail


def test_what_torch_asks_of_every_device_is_there():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        drawn = torch.randn(2, device=NAME)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert torch.equal(torch.randn(2), drawn.cpu())
    net = copy.deepcopy(Net().to(NAME))
    assert {p.device.type for p in net.parameters()} == {NAME}
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in net.parameters())


def test_a_real_accelerator_comes_first(monkeypatch):
    assert accelerator() == torch.device(NAME, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert accelerator() == torch.device("cuda", 0)
    assert (
        torch.accelerator.current_accelerator(check_available=True) is None
    )  # no library takes the pretended one by itself


EARLY = "torch.ones(2, requires_grad=True).sum().backward()"
TAKEN = "torch.utils.rename_privateuse1_backend('other')"
OLD = "del torch.utils.backend_registration._setup_privateuseone_for_python_backend"


@pytest.mark.parametrize(
    ("before", "reason"),
    [(EARLY, "a backward pass ran before"), (TAKEN, "'other' has its place"), (OLD, "no backends")],
)
def test_where_it_cannot_be_made_the_law_says_nothing(before, reason):
    code = (
        f"import torch\n{before}\nfrom dattri_core.laws import check\n"
        "found = {f.law: f for f in check('fold', 'mean').findings}['device-does-not-show']\n"
        "print(found.status, found.detail)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("skipped no CUDA here, and no pretended device: "), done.stdout
    assert reason in done.stdout


def test_made_twice_it_is_the_same():
    assert prepare() == ""
    assert pretended._why_not() == ""
