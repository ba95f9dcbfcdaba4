"""``dattri bench`` run in this process in the toy world, and what it leaves."""

import json

from toy_bench import CALLS

from dattri_core.cli import main

TIMES = ("seconds", "metric_seconds", "peak_bytes", "hardware")


def bench(out, *words, setting="toy"):
    """Run the command and return (exit status, what was done)."""
    CALLS.clear()
    folders = ["--out", str(out), "--retrained", str(out / "retrained")]
    return main(["bench", setting, "--size", "small", *words, *folders]), list(CALLS)


def results(out):
    return json.loads((out / "results.json").read_text())


def row_of(out, method, metric="agreement"):
    return next(r for r in results(out)["rows"] if (r["method"], r["metric"]) == (method, metric))


def untimed(value):
    """Return a record without what differs from run to run."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in TIMES}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def kept(out):
    """Return the files of a folder by path, times left out of records."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name != "results.csv" and path.suffix not in (".md", ".png"):
            data = path.read_bytes()
            if path.suffix == ".json":
                data = untimed(json.loads(data))
            found[str(path.relative_to(out))] = data
    return found
