"""The tuner moves into PEFT as it is: everything here runs in processes that cannot import `seal_peft`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch.testing import assert_close

from lift import lift, rename
from models import adapted, base_model
from peft_suite import add_seal

HERE = Path(__file__).parent
CONTRACT = ["test_peft_contract.py", "test_peft_contract_more.py"]
HELPERS = ["conftest.py", "custom_model.py", "models.py", "upstream.py", "versions.py"]


def copy_of_peft(folder: Path, with_context: bool = True) -> Path:
    shutil.copytree(Path(peft.__file__).parent, folder / "peft")
    lift(folder / "peft", with_context)
    # Runs when the interpreter starts: an installed `seal_peft` is not to be found.
    (folder / "sitecustomize.py").write_text('import sys\n\nsys.modules["seal_peft"] = None\n', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def lifted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_peft(tmp_path_factory.mktemp("lifted"))


def run(*command: str, source: Path, cwd: Path) -> str:
    """Run Python with another PEFT; return what it wrote."""
    settings = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def passed(output: str) -> int:
    (count,) = re.findall(r"(\d+) passed", output)
    return int(count)


def test_our_contract_with_peft_holds_inside_peft(lifted, tmp_path):
    for name in [*CONTRACT, *HELPERS]:
        shutil.copy(HERE / name, tmp_path)
        rename(tmp_path / name)
    shutil.copy(HERE.parent / "pyproject.toml", tmp_path)
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "gemma3 or gpt2", *CONTRACT]
    assert passed(run(*options, source=lifted, cwd=tmp_path)) > 80


BOTH_WAYS = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, SealConfig, get_peft_model
from transformers import AutoModelForCausalLM

assert sys.modules["seal_peft"] is None and type(PeftConfig.from_pretrained("ours")) is SealConfig
ids = torch.tensor([[3, 9, 27, 17]])
loaded = [
    AutoPeftModelForCausalLM.from_pretrained("ours"),
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "ours"),
    AutoModelForCausalLM.from_pretrained("ours"),
]
with torch.no_grad():
    torch.save([model.eval()(ids).logits for model in loaded], "logits.pt")

model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), SealConfig(granularity="channel"))
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
model(ids, labels=ids).loss.backward()
optimizer.step()
model.save_pretrained("theirs")
assert "seal_peft" not in open("theirs/README.md").read()
model = model.eval().merge_and_unload()
with torch.no_grad():
    torch.save(model(ids).logits, "theirs.pt")
"""


def test_adapters_of_the_package_and_of_peft_are_the_same_files(lifted, tmp_path):
    base_model("llama").save_pretrained(tmp_path / "base")
    model = adapted("llama", task_type="CAUSAL_LM").eval()
    ids = torch.tensor([[3, 9, 27, 17]])
    with torch.no_grad():
        expected = model(ids).logits
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "ours")

    run("-c", BOTH_WAYS, source=lifted, cwd=tmp_path)
    for result in torch.load(tmp_path / "logits.pt"):
        assert_close(result, expected, rtol=0, atol=1e-6)
    theirs = peft.PeftModel.from_pretrained(base_model("llama"), tmp_path / "theirs")
    with torch.no_grad():
        trained = theirs(ids).logits
    assert_close(trained, torch.load(tmp_path / "theirs.pt"), rtol=0, atol=1e-5)
    assert (trained - expected).abs().max() > 1e-3


WITHOUT_CONTEXT = """
import torch
from peft import SealConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

base = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4))
try:
    get_peft_model(base, SealConfig(rope_parameters={"rope_type": "yarn", "factor": 4.0}))
except ValueError as error:
    assert "cannot bring rope_parameters" in str(error)
else:
    raise AssertionError("not refused")
model = get_peft_model(base, SealConfig(init_weights=False)).eval()
ids = torch.tensor([[3, 9, 27, 17]])
expected = model(ids).logits
assert torch.allclose(model.merge_and_unload()(ids).logits, expected, atol=1e-5)
"""


def test_it_moves_without_context_extension_too(tmp_path):
    run("-c", WITHOUT_CONTEXT, source=copy_of_peft(tmp_path, with_context=False), cwd=tmp_path)


@pytest.mark.skipif(
    "PEFT_SOURCE" not in os.environ,
    reason="needs PEFT_SOURCE, a folder with PEFT's src and tests, which its source package has: `make test-peft`",
)
def test_pefts_own_tests_pass(tmp_path):
    checkout = tmp_path / "peft"
    shutil.copytree(os.environ["PEFT_SOURCE"], checkout)
    add_seal(checkout)
    files = [f"tests/{name}.py" for name in ("test_custom_models", "test_config", "test_decoder_models")]
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "ignore", "-k", "seal"]
    assert passed(run(*options, *files, source=checkout / "src", cwd=checkout)) > 600
