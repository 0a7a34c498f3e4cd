"""What others read in a process that cannot import this package: merged models and IA3 adapters, not SEAL's own."""

from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import models
from seal_peft import SealConfig, export_ia3
from seal_peft.merge import MergeArguments, merge
from stages import python, save_model

# All in one process, whose start takes longer than the rest. Its last line fails.
READER = """
import sys, torch
from pathlib import Path
folder, ids = Path(sys.argv[1]), torch.tensor(eval(sys.argv[2]))
sys.modules["seal_peft"] = sys.modules["peft"] = None  # as if neither were installed
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained(folder / "merged")
merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
assert sys.modules["seal_peft"] is None and sys.modules["peft"] is None
torch.save(merged(ids).logits.detach(), folder / "merged.pt")
del sys.modules["peft"]
from peft import PeftConfig, PeftModel
base = AutoModelForCausalLM.from_pretrained(folder / "model")
ia3 = PeftModel.from_pretrained(base, folder / "ia3").eval()
torch.save(ia3(ids).logits.detach(), folder / "ia3.pt")
assert sys.modules["seal_peft"] is None
PeftConfig.from_pretrained(folder / "channel")
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter of each granularity with its logits, one of them merged, the other exported."""
    folder = tmp_path_factory.mktemp("house")
    save_model(folder / "model")
    for granularity in ("head", "channel"):
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        adapted = get_peft_model(base, SealConfig(task_type="CAUSAL_LM", granularity=granularity)).eval()
        models.draw_scales(adapted)
        adapted.save_pretrained(str(folder / granularity))
        torch.save(models.logits(adapted), folder / f"{granularity}.pt")
        if granularity == "head":
            export_ia3(adapted, folder / "ia3")
    merge(MergeArguments(str(folder / "channel"), str(folder / "merged")))
    return folder


@pytest.fixture(scope="module")
def ended(house: Path) -> CompletedProcess:
    ended = python(READER, house, models.INPUT_IDS.tolist())
    assert (house / "ia3.pt").exists(), ended.stderr
    return ended


def test_plain_transformers_loads_the_merged_model_with_the_logits_of_the_adapter(
    house: Path, ended: CompletedProcess
) -> None:
    plain = torch.load(house / "merged.pt")
    torch.testing.assert_close(plain, torch.load(house / "channel.pt"), rtol=1e-5, atol=1e-5)
    base = models.logits(AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32))
    assert (plain - base).abs().max() > 0.01


def test_export_needs_no_seal_peft_to_load(house: Path, ended: CompletedProcess) -> None:
    torch.testing.assert_close(torch.load(house / "ia3.pt"), torch.load(house / "head.pt"), rtol=0, atol=2e-5)


def test_a_process_without_our_import_fails_with_the_error_that_the_card_explains(
    house: Path, ended: CompletedProcess
) -> None:
    assert ended.returncode == 1
    error = ended.stderr.strip().splitlines()[-1]
    assert error == "KeyError: 'SEAL'"
    card = (house / "channel" / "README.md").read_text()
    assert error in card and "import seal_peft" in card
