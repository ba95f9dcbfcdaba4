"""Locks: one writer at a time, and none after its process is gone, however it went."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dattri_core import StoreError, locks
from dattri_core.locks import lock_path, require_free, sole_writer

HOLD = """
import sys, time
from pathlib import Path
from dattri_core.locks import sole_writer
with sole_writer(Path(sys.argv[1]), "scores"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(folder, seconds=60, code=HOLD):
    """Return a process that holds the lock of a folder, when it does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    made = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # whose children end with the test
    )
    assert made.stdout.readline() == "held\n"
    return made


def test_another_process_is_named_and_after_a_kill_the_lock_is_free(tmp_path):
    folder = tmp_path / "scores.run"
    other = holder(folder)
    try:
        for refused in (lambda: sole_writer(folder, "scores 'a'").__enter__(),
                        lambda: require_free(folder, "scores 'a'")):  # fmt: skip
            with pytest.raises(StoreError, match=rf"^scores 'a': process {other.pid} on .* is wri"):
                refused()
    finally:
        other.kill()
        other.wait()
    assert lock_path(folder).exists()  # what a kill leaves keeps nobody out
    require_free(folder, "scores")
    with sole_writer(folder, "scores"):
        assert lock_path(folder).exists()
    assert list(tmp_path.iterdir()) == []


FORK = HOLD.replace(
    '    print("held", flush=True)\n',
    "    import os\n"
    "    if os.fork() == 0:\n"
    "        time.sleep(60)\n"
    "        os._exit(0)\n"
    '    print("held", flush=True)\n',
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process is a copy of another there")
def test_what_a_killed_writer_forked_keeps_no_lock(tmp_path):
    """Workers of a loader or of a pool outlive it."""
    other = holder(tmp_path / "rows", code=FORK)
    other.kill()
    other.wait()
    with sole_writer(tmp_path / "rows", "rows"):
        pass
    os.killpg(other.pid, signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process is a copy of another there")
def test_a_fork_that_leaves_the_block_frees_nothing(tmp_path):
    held = sole_writer(tmp_path / "rows", "rows")
    held.__enter__()
    child = os.fork()
    if child == 0:
        held.__exit__(None, None, None)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with pytest.raises(StoreError, match=f"process {os.getpid()} on .* is writing them"):
        require_free(tmp_path / "rows", "rows")
    held.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_who_is_waited_for_is_told(tmp_path, caplog):
    other = holder(tmp_path / "rows", seconds=1)
    with sole_writer(tmp_path / "rows", "rows", wait=True):
        assert f"rows: process {other.pid} on" in caplog.text
    other.wait()


def test_a_file_system_that_numbers_no_files_is_no_endless_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_is_at", lambda handle, path: False)
    with sole_writer(tmp_path / "rows", "rows"):
        assert lock_path(tmp_path / "rows").exists()


def test_waiting_goes_on_when_the_other_is_done(tmp_path):
    other = holder(tmp_path / "rows", seconds=0.5)
    with sole_writer(tmp_path / "rows", "rows", wait=True):
        other.wait(timeout=10)
    assert other.returncode == 0


def test_two_threads_are_two_writers(tmp_path):
    inside, together = [], []

    def write():
        with sole_writer(tmp_path / "rows", "rows", wait=True):
            inside.append(1)
            together.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=write) for _ in range(8)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks, "WAIT", 0.001)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert together == [1] * 8
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed there")
def test_a_file_that_was_removed_before_it_was_locked_is_no_lock(tmp_path, monkeypatch):
    """The writer before removes its file between our opening it and our locking it."""
    original, calls = locks._lock, []

    def late(handle):
        calls.append(handle)
        if len(calls) == 1:
            lock_path(tmp_path / "rows").unlink()
        return original(handle)

    monkeypatch.setattr(locks, "_lock", late)
    with sole_writer(tmp_path / "rows", "rows"):
        assert len(calls) == 2
        with pytest.raises(StoreError, match="is writing them"):
            require_free(tmp_path / "rows", "rows")


def test_an_error_inside_frees_the_lock(tmp_path):
    with pytest.raises(KeyboardInterrupt), sole_writer(tmp_path / "rows", "rows"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_said_and_nobody_is_kept_out(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.warns(UserWarning, match="has no locks"),
        sole_writer(tmp_path / "rows", "rows"),
    ):
        pass


def test_a_place_that_cannot_be_written_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StoreError, match=r"lock .*cannot be written"),
        sole_writer(tmp_path / "file" / "rows", "rows"),
    ):
        pass


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no such signal")
def test_a_process_that_is_stopped_still_holds_it(tmp_path):
    other = holder(Path(tmp_path / "rows"))
    try:
        other.send_signal(signal.SIGSTOP)
        with pytest.raises(StoreError, match="is writing them"):
            require_free(tmp_path / "rows", "rows")
    finally:
        other.kill()
        other.wait()
