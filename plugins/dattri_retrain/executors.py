"""Executors of other libraries as those of `concurrent.futures`, for `CounterfactualStore.fill`."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from attrs import frozen

from dattri_core import SpecError


def joblib_executor(workers: int | None = None, timeout: float = 300.0) -> Executor:
    """Return joblib's pool of processes, which is made once and used again.

    Args:
        workers: Number of processes; None: one for each core.
        timeout: Seconds after which idle processes end.

    Raises:
        SpecError: joblib cannot be imported.
    """
    loky = _library("joblib.externals.loky", "joblib")
    executor: Executor = loky.get_reusable_executor(max_workers=workers, timeout=timeout)
    return executor


def dask_executor(client: Any) -> Executor:
    """Return the workers of a dask cluster.

    Every job runs as its own task, also where two would give the same.

    Args:
        client: A ``distributed.Client``.

    Raises:
        SpecError: ``client`` is none.
    """
    if not hasattr(client, "get_executor"):
        raise SpecError(
            f"dask_executor: got a {type(client).__name__}, expected a distributed.Client, which "
            "has get_executor(); pip install distributed"
        )
    executor: Executor = client.get_executor(pure=False)
    return executor


def submitit_executor(executor: Any, poll: float = 5.0) -> Executor:
    """Return a submitit executor (Slurm, or its local and debug ones) with futures that wait.

    The jobs live on when this process ends, and write their rows; run again, it takes them up.

    Args:
        executor: A ``submitit.AutoExecutor`` with its parameters set: time, memory, partition.
        poll: Seconds between two looks at the jobs.

    Raises:
        SpecError: ``executor`` is none of submitit's.
    """
    if not all(hasattr(executor, name) for name in ("submit", "update_parameters")):
        raise SpecError(
            f"submitit_executor: got a {type(executor).__name__}, expected a "
            "submitit.AutoExecutor; pip install submitit"
        )
    return _Submitit(executor, poll)


@frozen(eq=False)
class _Submitit(Executor):
    executor: Any
    poll: float

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit a job, and wait for it in a thread of its own."""
        job = self.executor.submit(function, *args, **kwargs)
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        threading.Thread(target=_wait, args=(job, future, self.poll), daemon=True).start()
        return future


def _wait(job: Any, future: Future[Any], poll: float) -> None:
    try:
        while not job.done():
            time.sleep(poll)
        future.set_result(job.result())
    except Exception as error:
        future.set_exception(error)


def _library(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SpecError(
            f"executor: cannot import {name} ({error}); pip install {name}, or give any "
            "concurrent.futures.Executor"
        ) from error
