"""The code in README and docs runs as it stands, on a tiny model in place of a real one, pages in an empty folder.

Python blocks run in order and share their names. Of shell blocks `seal-peft` lines run, with less data and fewer
steps; `NOT_RUN` says why the others do not, and test_docs_blocks.py that they name what is there.
"""

import ast
import functools
import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import seal_peft
from hub_stub import running_hub
from models import INPUT_IDS, base_model, llama
from seal_peft import SealConfig, save_adapter
from stages import save_model, save_samples, seal
from test_hub import pretend_to_be_the_hub

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]

# What begins a shell line that the suite does not run from the page, and why.
NOT_RUN = {
    "git clone": "needs the repository's address",
    "python3 -m venv": "needs a shell that keeps it; the Makefile does the same",
    "make ": "installs; CI runs demo, test, quality and docs itself",
    "pip ": "needs a package index",
    'HF_HUB_OFFLINE=1 python -c "import seal_peft; from lm_eval': "tests/test_lm_eval.py, where lm-eval is installed",
    "python examples/": "tests/test_examples.py; tests/test_serving.py",
    "accelerate launch --multi_gpu": "tests/test_train.py; tests/test_evaluate_restarts.py",
    "PYTHONPATH=examples/axolotl": "tests/test_examples.py, by `make test-axolotl`",
    "transformers serve": "tests/test_serving.py",
    "curl ": "tests/test_serving.py",
    "python llama_cpp_python": "needs a C++ build of 25 minutes; results/serving-cpu.json",
    "python -m llama_cpp.server": "needs a C++ build of 25 minutes; results/serving-cpu.json",
    "seal-peft reproduce": "minutes at any size; tests/test_reproduce.py",
    "vllm ": "docs/serving.md says that it has not been run",
    "python -m sglang": "docs/serving.md says that it has not been run",
}
# Pages with a test of their own.
ELSEWHERE = {"docs/tasks.md": "tests/test_docs_tasks.py"}


def blocks(page: str, language: str | None = None) -> list[tuple[str, str]]:
    found = re.findall(r"^```(python|bash)\n(.+?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    return [(kind, code) for kind, code in found if language in (None, kind)]


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: a model, adapters, samples, results, your own rows."""
    folder = tmp_path_factory.mktemp("page")
    save_model(folder / "my" / "model", max_position_embeddings=16384)
    base = AutoModelForCausalLM.from_pretrained(folder / "my" / "model")
    adapter = folder / "runs" / "my" / "adapter"
    save_adapter(get_peft_model(base, SealConfig(task_type="CAUSAL_LM", granularity="channel")), adapter)
    base = AutoModelForCausalLM.from_pretrained(folder / "my" / "model")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder / "runs" / "my" / "lora")
    for name in ("runs/my/test.jsonl", "runs/my/held-out.jsonl"):
        save_samples(folder / name, "test", num_samples=2)
    save_samples(folder / "runs" / "my" / "train.jsonl", num_samples=2)
    words = ["--model_name_or_path", folder / "my" / "model", "--test_file", folder / "runs" / "my" / "test.jsonl"]
    words += ["--adapters", adapter, "--output_dir", adapter.parent / "eval", "--max_new_tokens", 2]
    assert seal("evaluate", *words) == 0
    turns = [{"role": "user", "content": "Shelf 7. Which shelf?"}, {"role": "assistant", "content": "Shelf 7."}]
    rows = [json.dumps({"messages": turns}) + "\n"] * 2
    (folder / "my.jsonl").write_text("".join(rows))
    (folder / "train.jsonl").write_text("".join(rows))
    for name in ("my-adapter", "runs/demo/adapter", "yarn-16k"):
        shutil.copytree(adapter, folder / name)
    return folder


@pytest.fixture
def workplace(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A copy of the furnished folder, and a Hub that knows what the pages pull."""
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.rglob("*.json"):  # adapters and metrics name models by their absolute paths
        file.write_text(file.read_text().replace(str(furnished), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", classmethod(at_home(kind.from_pretrained.__func__, tmp_path)))
    with running_hub() as hub:
        hub.repos["someone/model"] = {"main": {"config.json": (tmp_path / "my/model/config.json").read_bytes()}}
        pretend_to_be_the_hub(hub, tmp_path / "cache", monkeypatch)
        yield tmp_path


def at_home(original, folder: Path):
    """`from_pretrained` that finds models of the Hub in the tiny folder: there is no Hub here that has them."""

    def from_pretrained(cls, name, *args, **kwargs):
        abroad = str(name).startswith(("HuggingFaceTB/", "someone/"))
        return original(cls, folder / "my" / "model" if abroad else name, *args, **kwargs)

    return from_pretrained


def run_shell(line: str, model: Path) -> None:
    """Run a `seal-peft` line of a page, with as little work as it takes."""
    words = shlex.split(line, comments=True)[1:]
    words = [str(model) if word in ("smollm2", "my/model", "my/8k-model") else word for word in words]
    words = [word for word in words if word != "--guard"]  # half a minute; tests/test_guard.py
    words = [{"L14H7": "L1H3", "L20H1": "L0H1"}.get(word, word) for word in words]
    words = [name for word in words for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    stage = words[0]
    if "--lengths" in words:
        start = words.index("--lengths") + 1
        end = next((i for i in range(start, len(words)) if words[i].startswith("--")), len(words))
        words[start:end] = ["1000", "1200"][: end - start]
    for few in {"--num_samples", "--questions_per_context"} & {*words}:  # many questions do not fit these lengths
        words[words.index(few) + 1] = "2"
    # Lines of a page are alternatives, and may name one folder.
    words += {"train": ["--max_steps", "1", "--overwrite_output_dir"], "evaluate": ["--max_new_tokens", "2"]}.get(
        stage, []
    )
    if stage == "push" and "--base_model" not in words:
        words += ["--base_model", "someone/model"]
    assert seal(*words) == 0, line


def run(page: str, names: dict, folder: Path) -> dict:
    """Run all blocks of a page in order."""
    defined = {"__name__": "page", **names}
    for kind, code in blocks(page):
        if kind == "python" and not ("from trl" in code and importlib.util.find_spec("trl") is None):
            exec(compile(code, page, "exec"), defined)
        for line in code.splitlines() if kind == "bash" else []:
            if line.startswith("seal-peft") and not line.startswith(tuple(NOT_RUN)):
                run_shell(line, folder / "my" / "model")
    return defined


# The Trainer's defaults pin memory, which torch warns about where there is no GPU; the others are of the loaders.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Merging lora module:UserWarning")
@pytest.mark.filterwarnings("ignore:The base model of this adapter is a folder of this machine:UserWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page) and page not in ELSEWHERE])
def test_the_code_of_the_page_runs(page: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {}
    if page == "docs/adapters.md":
        names = {name: base_model("llama") for name in ("base_model", "another_base_model", "fresh_base_model")}
        names["two_prompts"] = INPUT_IDS
    if page == "docs/context.md":
        extended = "base_model another_base_model fresh_base_model plain_model lora_base_model one_more_base_model"
        names = {name: llama(max_position_embeddings=8192) for name in extended.split()}
    if page == "docs/trainers.md" and importlib.util.find_spec("trl"):
        import trl

        # Its defaults are for GPUs.
        monkeypatch.setattr(trl, "SFTConfig", functools.partial(trl.SFTConfig, use_cpu=True))
    defined = run(page, names, workplace)
    if page == "README.md":
        assert type(defined["plain"]).__name__ == "LlamaForCausalLM"
        assert (workplace / "merged" / "model.safetensors").is_file()
    if page == "docs/adapters.md":
        assert defined["output"].shape == (2, INPUT_IDS.shape[1] + 4)
        assert not any(hasattr(module, "seal_delta") for module in defined["plain"].modules())
        assert (workplace / "adapters" / "lines-again" / "adapter_config.json").is_file()
    if page == "docs/context.md":
        assert defined["merged"].config.rope_parameters["rope_type"] == "yarn"
        assert defined["advice"].settings == {"self_extend": {"group_size": 8, "window": 1024}}
        assert (workplace / "pair" / "long" / "adapter_config.json").is_file()


def test_every_other_line_is_left_out_for_a_reason() -> None:
    lines = [line for page in PAGES for _, code in blocks(page, "bash") for line in code.splitlines() if line]
    left = [line for line in lines if not line.startswith(("seal-peft", *NOT_RUN))]
    assert not left
    unused = [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)]
    assert not unused


def test_the_quickstart_of_the_readme_is_short() -> None:
    code = blocks("README.md", "python")[0][1]
    training = code.partition("\nmodel = AutoPeftModel")[0]
    assert len([line for line in training.splitlines() if line]) < 15
    assert len([line for line in code.splitlines() if line]) <= 15


# --- the FAQ ---------------------------------------------------------------------------------------------------------

# Errors of others that SEAL's users meet, and where they come from.
UPSTREAM = {
    "KeyError: 'SEAL'": "tests/test_transformers_api.py",
    "module 'seal_peft' has no attribute": "Python, where a folder of that name lies beside the script",
    "Cannot combine adapters with different peft types": "peft, in tests/test_bad_adapters.py",
    "Repo id must be in the form": "transformers, in tests/test_bad_adapters.py",
    "Unable to fetch remote file": "peft, where there is no network",
    "is_activation_checkpointing": "transformers 5.23 under peft 0.21.2",
    "Cannot reach": "huggingface_hub, in tests/test_hub.py",
    "offline mode is enabled": "huggingface_hub, in tests/test_hub.py",
}


def test_the_errors_of_the_faq_are_the_ones_that_are_raised() -> None:
    texts = []
    for path in Path(seal_peft.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(p.value if isinstance(p, ast.Constant) else "..." for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    everything = "\n".join(texts)
    page = (ROOT / "docs/faq.md").read_text(encoding="utf-8")
    headings = [text for line in re.findall(r"^## (`.+)$", page, re.MULTILINE) for text in re.findall("`(.+?)`", line)]
    assert len(headings) >= 12
    for heading in headings:
        for part in heading.split("..."):
            assert part.strip(": ") in everything or part.strip(": ") in UPSTREAM, heading
