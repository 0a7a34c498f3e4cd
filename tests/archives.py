"""What the tests of the package share: its two archives, built as pip builds them, and commands elsewhere."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ["seal_peft", "pyproject.toml", "README.md", "LICENSE"]


def call(*command: object, cwd: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONWARNINGS"] = "ignore"
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


def _build(kind: str, source: Path, target: Path) -> Path:
    """Call the build backend as pip does, without an environment of its own: there is no network here."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    ended = call(sys.executable, "-c", code, target, cwd=source)
    assert ended.returncode == 0, ended.stderr
    return target / ended.stdout.splitlines()[-1]


def build_archives(folder: Path) -> dict[str, Path]:
    """Build an sdist, and a wheel from the unpacked sdist, as package indexes do it."""
    source = folder / "source"
    source.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, source / part)
    sdist = _build("sdist", source, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return {"sdist": sdist, "wheel": _build("wheel", next((folder / "unpacked").iterdir()), folder)}
