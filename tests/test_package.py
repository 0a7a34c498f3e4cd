"""The package as others get it: built, installed into an empty environment, and started there."""

import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from archives import ROOT, build_archives, call


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77.0.3")
    return build_archives(tmp_path_factory.mktemp("build"))["wheel"]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel and, of other packages, sees those of this one."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # Plain paths, not `addsitedir`: the development install of this environment must not be found.
    seen = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(seen) + "\n")
    return folder / "bin" / "python"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"seal_peft", "seal_peft-0.1.0.dist-info"}
    inside = {name for name in names if name.startswith("seal_peft/")}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "seal_peft").rglob("*.py")}
    assert inside == expected | {"seal_peft/card.md", "seal_peft/card_several.md", "seal_peft/py.typed"}
    assert wheel.stat().st_size < 400_000  # code and two templates; an asset would be megabytes


def test_the_command_it_installs_is_the_command_line(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "seal-peft = seal_peft.cli:main" in archive.read(entry).decode()
    (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    listed = archive.read(metadata).decode()
    for needed in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        assert f"Requires-Dist: {needed}" in listed


def test_it_runs_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    code = """
import seal_peft
from peft import get_peft_model
from seal_peft.card import CardFacts, render_card
from seal_peft.cli import main
from transformers import LlamaConfig, LlamaForCausalLM
print(seal_peft.__version__, seal_peft.__file__)
try:
    main(["--help"])
except SystemExit as end:
    print("code", end.code)
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), seal_peft.SealConfig()).save_pretrained("adapter")
print(seal_peft.scales("adapter"))
print(render_card("adapter", {}, CardFacts()))
"""
    ended = call(installed, "-c", code, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    first, usage = ended.stdout.splitlines()[:2]
    version, path = first.split()
    assert version == "0.1.0"
    assert Path(path).is_relative_to(installed.parents[1])
    assert usage == "usage: seal-peft demo --output_dir runs/demo"
    assert "code 0" in ended.stdout
    assert "o_proj': tensor([1., 1.])" in ended.stdout
    assert "SEAL is not part of PEFT: import `seal_peft` first" in ended.stdout  # the template came along
