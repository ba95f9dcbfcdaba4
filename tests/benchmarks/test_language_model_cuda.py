"""A language model of 124M parameters on a GPU: EK-FAC against a plain forward and backward pass.

Goals: the passes of the fit take at most 3 times a plain pass over the same sequences, scoring at
most 1.5 times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from dattri_benchmarks.models import gpt2
from dattri_parts.curvatures import ekfac
from table import Table, Theme, seconds
from torch import Tensor, nn

import dattri_core as dattri

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.timeout(0),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
SEQUENCES, LENGTH, QUERIES = 1024, 512, (16, 64)
PLAIN_BATCH = 64
THEME = Theme(
    "language_model_cuda",
    "EK-FAC of a language model of 124M parameters on a GPU",
    f"GPT-2's shape with random weights in bfloat16, {SEQUENCES} sequences of {LENGTH} random "
    "tokens, curvature of sampled labels and scores of the weights and biases of all 48 linear "
    "layers and the norms (`parameters='blocks.*'`), products of float32 numbers in TF32 "
    "(`torch.set_float32_matmul_precision('high')`). The plain pass has weight gradients of all "
    f"parameters, in batches of {PLAIN_BATCH}. The decomposition of the factors, in float64, does "
    "not grow with the sequences; the rest of the fit, and scoring, do. Times in seconds are the "
    "first of their kind but for a run of 64 sequences before.",
)


def tokens(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random sequences as inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 50257, (count, LENGTH), generator=generator)
    return drawn, drawn


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the wall time of work on the device, and what it returned."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    found = work()
    torch.cuda.synchronize()
    return time.perf_counter() - start, found


def plain_pass(model: nn.Module, sequences: Tensor) -> None:
    """Run forward and backward with weight gradients over all sequences, as training does."""
    for part in sequences.split(PLAIN_BATCH):
        there = part.cuda()
        logits = model(there)[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, there[:, 1:].flatten(), reduction="sum")
        model.zero_grad(set_to_none=True)
        loss.backward()


def made(dtype: torch.dtype, layers: int = 12) -> nn.Module:
    """Return the network on the device."""
    torch.manual_seed(0)
    return gpt2(length=LENGTH, layers=layers).to("cuda", dtype).eval()


def task_of(model: nn.Module) -> dattri.Task:
    """Return what is attributed."""
    return dattri.Task(model, "causal-lm", parameters=["blocks.*"])


@pytest.fixture
def fast_products() -> Iterator[None]:
    """Let float32 products run in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def decomposing(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list to which the times of decompositions are added."""
    times: list[float] = []
    decompose = ekfac.decompose_all

    def measured(*given: Any) -> Any:
        taken, found = timed(lambda: decompose(*given))
        times.append(taken)
        return found

    monkeypatch.setattr(ekfac, "decompose_all", measured)
    return times


def test_tokens_a_second(
    benchmark: Any, table: Table, fast_products: None, decomposing: list[float]
) -> None:
    """The fit and scoring, as ratios to a plain pass in the same run."""
    model, train = made(torch.bfloat16), tokens(SEQUENCES, 0)
    warm = tokens(PLAIN_BATCH, 1)
    plain_pass(model, warm[0])
    plain = min(timed(lambda: plain_pass(model, train[0]))[0] for _ in range(2))
    model.zero_grad(set_to_none=True)
    method = dattri.method("if-ekfac")
    small = made(torch.bfloat16, layers=1)
    method.fit(task_of(small), warm).attribute(tokens(4, 2))
    del small
    decomposing.clear()
    torch.cuda.reset_peak_memory_stats()
    whole, fitted = timed(lambda: method.fit(task_of(model), train))
    apart = sum(decomposing)
    rate = SEQUENCES * LENGTH
    _put(table, "plain forward and backward pass", plain, plain, rate, "", "")
    _put(
        table, "fit: its two passes", whole - apart, plain, rate, "<= 3", whole - apart < 3 * plain
    )
    _put(table, "fit: decomposition of the factors", apart, plain, None, "", "")
    _put(table, "fit, all of it", whole, plain, rate, "", "")
    for count in QUERIES:
        queries = tokens(count, 3)
        taken, scores = timed(partial(fitted.attribute, queries))
        assert torch.isfinite(torch.as_tensor(scores.values)).all()
        met = taken <= 1.5 * plain
        _put(table, f"scoring, {count} queries", taken, plain, rate, "<= 1.5", met)
    peak = torch.cuda.max_memory_allocated() / 2**30
    table.put("peak memory", time=f"{peak:.1f} GiB")
    benchmark.extra_info.update(plain=plain, fit=whole, decomposition=apart)
    benchmark.pedantic(lambda: None, rounds=1)


def test_half_precision_agrees(benchmark: Any, table: Table, fast_products: None) -> None:
    """Scores in bfloat16 and TF32 against those of the same weights in float32, two layers."""
    found = []
    for dtype, precision in ((torch.bfloat16, "high"), (torch.float32, "highest")):
        model = made(torch.bfloat16, layers=2).to(dtype)
        torch.set_float32_matmul_precision(precision)
        fitted = dattri.method("if-ekfac").fit(task_of(model), tokens(128, 0))
        found.append(torch.as_tensor(fitted.attribute(tokens(16, 3)).values).double().flatten())
    agreement = float(torch.corrcoef(torch.stack(found))[0, 1])
    table.put(
        "agreement with float32, 2 layers, 128 sequences, 16 queries",
        time="",
        ratio=f"Pearson {agreement:.5f}",
    )
    benchmark.pedantic(lambda: None, rounds=1)


def _put(
    table: Table, what: str, taken: float, plain: float, count: int | None, goal: str, met: object
) -> None:
    rate = "" if count is None else f"{count / taken:,.0f}"
    cells = {"time": seconds(taken), "tokens a second": rate, "ratio": f"{taken / plain:.2f}"}
    table.put(what, **cells, goal=goal, met=met)
    print(what, cells)
