"""Runs in processes of their own: a time limit, a memory limit, one line of JSON back."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PEER_MEMORY = 14 * 2**30
"""Address space that a peer may take: where it needs more, it fails, and the machine does not."""


class UnfinishedError(Exception):
    """A run that was stopped at its limit, or failed; the message is for a table."""

    def __init__(self, message: str, *, stopped: bool) -> None:
        super().__init__(message)
        self.stopped = stopped


def own(job: dict[str, Any], limit: float | None = None) -> Any:
    """Run a job (see `own_run`) of ours."""
    return _run([sys.executable, str(HERE / "own_run.py"), json.dumps(job)], limit, None)


def peer(script: str, job: dict[str, Any], limit: float | None = None) -> Any:
    """Run a peer's script in its environment; None where DATTRI_PEERS_PYTHON names none."""
    python = os.environ.get("DATTRI_PEERS_PYTHON")
    if not python:
        return None
    return _run([python, str(HERE / script), json.dumps(job)], limit, PEER_MEMORY)


def _run(command: list[str], limit: float | None, memory: int | None) -> Any:
    paths = [str(ROOT), str(ROOT / "plugins")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

    def bounded() -> None:
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=bounded,
    )
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        raise UnfinishedError(f"stopped at {limit:.0f} s", stopped=True) from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        said = (errors.strip().splitlines() or ["nothing on stderr"])[-1]
        raise UnfinishedError(
            f"failed after {time.monotonic() - start:.0f} s ({process.returncode}): {said[:300]}",
            stopped=False,
        )
    return json.loads(output.strip().splitlines()[-1])
