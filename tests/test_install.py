"""The package as a stranger gets it: pip puts it into an empty environment, with all that it asks for, and it works.

`make test-package` runs this; it installs more than a gigabyte, so the suite leaves it out.
"""

import venv
from pathlib import Path

import pytest

from archives import ROOT, build_archives, call

SMOKE = """
import seal_peft
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=8)
model = get_peft_model(LlamaForCausalLM(config), seal_peft.SealConfig())
print(seal_peft.__file__, len(seal_peft.scales(model)))
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build_archives(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment with pip and nothing else; its dependencies come with the first archive."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=True)
    return folder


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_pip_installs_it_with_its_dependencies_and_it_runs(
    archives: dict[str, Path], empty: Path, tmp_path: Path, kind: str
) -> None:
    pip = [empty / "bin" / "python", "-m", "pip"]
    call(*pip, "uninstall", "--yes", "seal-peft", cwd=tmp_path)
    ended = call(*pip, "install", "-c", ROOT / "constraints.txt", archives[kind], cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    checked = call(*pip, "check", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout

    program = empty / "bin" / "seal-peft"
    helped = call(program, "--help", cwd=tmp_path)
    assert helped.returncode == 0, helped.stderr
    assert helped.stdout.startswith("usage: seal-peft demo --output_dir runs/demo\n")
    smoke = call(empty / "bin" / "python", "-c", SMOKE, cwd=tmp_path)
    assert smoke.returncode == 0, smoke.stderr
    path, layers = smoke.stdout.split()
    assert Path(path).is_relative_to(empty)
    assert int(layers) == 2
    failed = call(program, "push", "--adapter", tmp_path, "--repo_id", "me/mine", cwd=tmp_path)
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert call(program, "push", cwd=tmp_path).returncode == 2
