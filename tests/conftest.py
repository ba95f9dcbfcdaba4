"""Makes the shared oracles importable, and the pretended device before autograd starts."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from pathlib import Path

import pytest

# Processes that share the tests share the cores too; torch counts its threads when it is loaded.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

sys.path.insert(0, str(Path(__file__).parent))

# The first backward pass comes after this, in the first test.
importlib.import_module("dattri_core.laws.pretended").prepare()

try:
    importlib.import_module("torchvision")
except (ImportError, RuntimeError):  # of another build of torch
    # Transformers would load it because it is installed, and load nothing else then.
    sys.modules["torchvision"] = None  # type: ignore[assignment]

LONGEST = frozenset(
    {
        "test_builtin_parts.py::test_built_in[method-if-lissa]",
        "test_builtin_parts.py::test_built_in[method-if-cg]",
        "test_builtin_parts.py::test_other_settings_of_built_ins[solver-lissa-changes4]",
        "test_builtin_parts.py::test_other_settings_of_built_ins[solver-lissa-changes5]",
        "test_builtin_parts.py::test_other_settings_of_built_ins[curvature-leading-ggn-changes7]",
        "test_builtin_parts.py::test_other_settings_of_built_ins[curvature-leading-ggn-changes8]",
        (
            "test_builtin_parts.py::"
            "test_a_series_that_is_preconditioned_meets_the_laws_of_methods_after_two_steps"
        ),
        "test_every_distribution.py::test_its_own_tests_pass[dattri-curvlinops]",
        "test_every_distribution.py::test_its_own_tests_pass[dattri-tempered-cosine]",
        "test_inverses_agree.py::test_all_solvers_give_the_dense_scores[hessian-tokens]",
        "test_study_runs.py::test_processes_give_the_same_numbers",
        "test_queries_on_disk.py::test_every_scorer_and_sweeps_read_them[relatif]",
        "test_leverages.py::test_others_are[ggn-relatif-ggn-2MiB]",
        "test_pages.py::test_a_run_in_cut_batches_gives_the_scores_of_one_batch[grad-dot]",
        "test_queries_on_disk.py::test_every_scorer_and_sweeps_read_them[cosine]",
        "test_routes.py::test_no_route_shows[network-ekfac, cosine]",
        "test_routes.py::test_no_route_shows[network-ekfac, distance]",
        "test_on_a_device.py::test_small_memory_and_scores_on_disk[if-arnoldi-pretended]",
        "test_on_a_device.py::test_a_fitted_method_and_its_store[if-arnoldi-pretended]",
        (
            "test_models.py::test_curvature_products_equal_the_dense_curvature"
            "[resnet9 with group norm-hessian]"
        ),
    }
)
"""Cases of tests whose other cases are short, and whose parts other tests hold to the same."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the longest cases, before marks are chosen by."""
    for item in items:
        if item.nodeid.rpartition("/")[2] in LONGEST:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Take what is imported and collected out of the reach of garbage collection.

    Every peak of memory that is measured begins with a collection, which else would visit a million
    objects of modules and tests.
    """
    importlib.import_module("torch._dynamo")  # a dispatch mode or an optimiser would load it
    gc.collect()
    gc.freeze()
