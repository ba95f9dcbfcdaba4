"""An environment to install third parties' distributions into, without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


class Environment:
    """A virtual environment that also sees what this one has, so that nothing is downloaded."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        scripts = "Scripts" if os.name == "nt" else "bin"
        self.python = folder / scripts / "python"
        own = subprocess.run(
            [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        theirs = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        lines = [f"import site; site.addsitedir({path!r})" for path in sorted(theirs)]
        (Path(own) / "theirs.pth").write_text("\n".join(lines) + "\n")

    def pip(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def install(self, *sources: Path) -> None:
        offline = ("--no-deps", "--no-build-isolation", "--no-index")
        self.pip("install", *offline, *map(str, sources))

    def run(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k != "DATTRI_PLUGINS"}
        return subprocess.run(
            [self.python, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            env=environment,
        )

    def dattri(self, *arguments: str) -> str:
        done = self.run("-m", "dattri_core", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def copied(source: Path, folder: Path) -> Path:
    """Return a copy of a distribution: building writes into its folder."""
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(source, folder / source.name, ignore=ignored))
