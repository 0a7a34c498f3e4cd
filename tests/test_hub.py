"""Pushing to and pulling from a Hub: over real HTTP, to a stub on this machine that can fail in every way."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import models
import seal_peft
from hub_stub import TOKEN, Fault, Hub, running_hub
from seal_peft import SealConfig, hub
from seal_peft.files import write_json
from seal_peft.loading import load_config
from seal_peft.tuner.reading import read_adapter
from stages import error_of, python, save_model, save_samples, seal

REPO = "me/my-adapter"
# huggingface_hub 2.4.0 uploads large files in a way that httpx2 no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, an adapter trained and evaluated by the command line."""
    folder = tmp_path_factory.mktemp("house")
    base = ["--model_name_or_path", save_model(folder / "model"), "--dtype", "float32"]
    train, test = (save_samples(folder / f"{split}.jsonl", split) for split in ("train", "test"))
    out = ["--output_dir", folder / "adapter", "--max_steps", 2, "--save_steps", 9, "--learning_rate", 0.05]
    assert seal("train", *base, "--train_file", train, *out, "--disable_tqdm", "true") == 0
    ask = ["--test_file", test, "--adapters", f"ours={folder / 'adapter'}", "--max_new_tokens", 4]
    assert seal("evaluate", *base, *ask, "--output_dir", folder / "eval") == 0
    return folder


@pytest.fixture
def adapter(house: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(house / "adapter", tmp_path / "my-adapter"))


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A Hub that this process believes to be the only one, with a token to write to it."""
    with running_hub() as served:
        pretend_to_be_the_hub(served, tmp_path / "cache", monkeypatch)
        yield served


def pretend_to_be_the_hub(served: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point huggingface_hub, which read its environment when it was imported, to another Hub; log in there."""
    for name, value in {
        "ENDPOINT": served.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": served.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", served.url)
    if hasattr(transformers.utils.hub, "_hf_api"):  # transformers 5.23 keeps one, 5.10 does not
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    huggingface_hub.utils._http.close_session()  # it knows whether the network is allowed


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed: pictures take most of the time of a push."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def push(adapter: Path, **options: Any) -> str:
    return seal_peft.push(adapter, REPO, **{"base_model": "someone/tiny", **options})


def card_of(served: Hub, repo: str = REPO) -> ModelCard:
    return ModelCard(served.files(repo)["README.md"].decode())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- there and back ------------------------------------------------------------------------------------------------


def test_what_is_pushed_is_the_adapter_its_records_and_its_card(adapter: Path, online: Hub) -> None:
    (adapter / "notes.txt").write_text("mine")
    address = push(adapter)
    assert address.startswith(f"{online.url}/{REPO}/commit/")
    records = {"README.md", "run.json", "scales.png", "scales.json"}
    assert online.files(REPO).keys() == {"adapter_config.json", "adapter_model.safetensors", *records}
    assert online.files(REPO)["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert sum("/commit/" in line for line in online.requests) == 1


def test_a_pulled_adapter_has_the_logits_of_the_pushed_one(house: Path, adapter: Path, online: Hub) -> None:
    push(adapter)
    base = AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32).eval()
    untouched = models.logits(base)
    pulled = models.logits(PeftModel.from_pretrained(base, REPO))
    local = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
    torch.testing.assert_close(pulled, models.logits(local))
    assert (pulled - untouched).abs().max() > 1e-4
    assert PeftConfig.from_pretrained(REPO).base_model_name_or_path == "someone/tiny"


def test_a_revision_is_pushed_and_pulled_by_its_name(house: Path, adapter: Path, online: Hub) -> None:
    push(adapter)
    first = online.files(REPO)["adapter_model.safetensors"]
    base = AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32)
    other = get_peft_model(base, SealConfig(task_type="CAUSAL_LM"))
    models.draw_scales(other)
    other.save_pretrained(adapter)
    push(adapter, revision="heads")
    assert online.files(REPO)["adapter_model.safetensors"] == first
    base = AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32)
    pulled = PeftModel.from_pretrained(base, REPO, revision="heads")
    assert pulled.peft_config["default"].granularity == "head"
    torch.testing.assert_close(seal_peft.scales(pulled), seal_peft.scales(adapter))
    with pytest.raises(ValueError, match="Can.t find .adapter_config.json"):
        PeftModel.from_pretrained(base, REPO, revision="no-such")


def test_the_stages_take_an_adapter_from_the_hub(
    house: Path, adapter: Path, online: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(adapter)
    words = ["--adapter", REPO, "--model_name_or_path", house / "model"]
    assert seal("merge", *words, "--output_dir", tmp_path / "merged") == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


# The base model of these adapters is on no Hub, and PEFT looks whether its vocabulary is another.
@pytest.mark.filterwarnings("ignore:Could not find a config file in someone/tiny:UserWarning")
def test_pefts_own_push_sends_our_card_and_no_local_folder(house: Path, adapter: Path, online: Hub) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    with pytest.warns(UserWarning, match="folder of this machine .* names only './model'.* seal_peft.push.folder"):
        model.push_to_hub(REPO)
    base = AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32)
    pulled = PeftModel.from_pretrained(base, REPO)
    torch.testing.assert_close(seal_peft.scales(pulled), seal_peft.scales(adapter))
    card = card_of(online)
    assert (card.data.library_name, card.data.base_model) == ("peft", None)
    assert f'from_pretrained("{REPO}")' in card.text
    assert "import seal_peft" in card.text
    assert str(house).encode() not in b"".join(online.files(REPO).values())
    model.peft_config["default"].base_model_name_or_path = "someone/tiny"
    model.push_to_hub(REPO, commit_message="Named")  # over a card that is there
    assert card_of(online).data.base_model == "someone/tiny"
    assert PeftConfig.from_pretrained(REPO).base_model_name_or_path == "someone/tiny"
    online.files(REPO)["README.md"] = b"# My own\n"
    model.push_to_hub(REPO)
    assert card_of(online).text.strip() == "# My own"


@pytest.mark.filterwarnings("ignore:Could not find a config file in someone/tiny:UserWarning")
def test_a_mistyped_folder_costs_one_question_to_the_hub_and_is_called_a_folder(adapter: Path, online: Hub) -> None:
    push(adapter)
    assert read_adapter(REPO).base_model_name_or_path == "someone/tiny"
    for read, file in ((read_adapter, "adapter_config.json"), (load_config, "config.json")):
        online.requests.clear()
        with pytest.raises(
            (ValueError, OSError), match=f"There is no folder 'runs/typo', and the Hub.* no such {file}"
        ):
            read("runs/typo")
        online.faults.append(Fault(f"HEAD /runs/typo/.*{file}"))
        with pytest.raises(
            (ValueError, OSError), match="There is no folder 'runs/typo', and the Hub.* refused or did not answer"
        ):
            read("runs/typo")
        assert online.requests == [f"HEAD /runs/typo/resolve/main/{file}"] * 2


@pytest.mark.filterwarnings("ignore:Could not find a config file in someone/tiny:UserWarning")
def test_what_reads_an_adapter_takes_the_id_of_one_on_the_hub(adapter: Path, online: Hub, tmp_path: Path) -> None:
    push(adapter)
    expected = seal_peft.scales(adapter)
    swapped = models.adapted("llama", "channel")
    seal_peft.hotswap_adapter(swapped, REPO)
    together = seal_peft.load_adapters(models.base_model("llama"), {"heads": REPO})
    folder = seal_peft.import_ia3(
        seal_peft.export_ia3(REPO, tmp_path / "ia3"), tmp_path / "again", base_model=models.base_model("llama")
    )
    for found in (seal_peft.scales(swapped), seal_peft.scales(together, "heads"), seal_peft.scales(folder)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Could not find a config file in someone/tiny:UserWarning")
@pytest.mark.parametrize("names", [("style", "heads"), ("default", "heads")])
def test_lora_and_seal_in_one_repository_are_pulled_as_a_pair_and_one_by_one(
    house: Path, online: Hub, tmp_path: Path, names: tuple[str, str]
) -> None:
    def base() -> Any:
        loaded = AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32)
        loaded.config._name_or_path = loaded.name_or_path = "someone/tiny"
        return loaded

    lora = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False), names[0])
    pair = seal_peft.add_beside(lora, SealConfig(task_type="CAUSAL_LM", init_weights=False), "heads")
    lora.peft_config[names[0]].base_model_name_or_path = str(house / "model")
    with pytest.warns(UserWarning, match="folder of this machine .* names only './model'"):
        pair.push_to_hub("me/pair")
    assert str(house).encode() not in b"".join(online.files("me/pair").values())
    card = card_of(online, "me/pair")
    assert card.data.base_model == "someone/tiny"
    code = card.text.partition("```python\n")[2].partition("```")[0]
    code = code.replace("someone/tiny", str(house / "model"))
    defined: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), defined)
    torch.testing.assert_close(models.logits(defined["model"].eval()), models.logits(pair.eval()))
    heads = PeftModel.from_pretrained(base(), "me/pair", subfolder="heads")
    torch.testing.assert_close(seal_peft.scales(heads), seal_peft.scales(pair, "heads"))
    style = PeftModel.from_pretrained(base(), "me/pair", subfolder="style" if names[0] == "style" else None)
    assert type(style.active_peft_config) is LoraConfig
    pair.save_pretrained(tmp_path / "pair")
    with pytest.raises(
        ValueError, match=r"pair is not an adapter folder.* It holds .*pair/heads.* Push|another method"
    ):
        seal_peft.push(tmp_path / "pair", "me/other")


def test_lora_users_keep_what_peft_does(house: Path, online: Hub) -> None:
    base = AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32)
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).push_to_hub("me/lora")
    assert card_of(online, "me/lora").data.library_name == "transformers"


def test_a_trainers_push_sends_our_card_with_its_record_of_the_training(
    house: Path, online: Hub, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32)
    model = get_peft_model(base, SealConfig(task_type="CAUSAL_LM"))
    options = {"hub_model_id": REPO, "report_to": "none", "use_cpu": True, "learning_rate": 0.0123}
    trainer = transformers.Trainer(model, transformers.TrainingArguments(str(tmp_path / "out"), **options))
    with pytest.warns(UserWarning, match="folder of this machine .*adapter_config.json does.* seal_peft.push.folder"):
        trainer.push_to_hub()
    card = card_of(online)
    assert card.data.to_dict().get("base_model") is None
    assert (card.data.library_name, card.text.count("import seal_peft")) == ("peft", 1)
    assert "- learning_rate: 0.0123" in card.text
    assert str(house).encode() not in online.files(REPO)["README.md"]
    assert str(house).encode() in online.files(REPO)["adapter_config.json"]  # if not, docs/hub.md is out of date

    model.peft_config["default"].base_model_name_or_path = "someone/tiny"
    model.config._name_or_path = "someone/tiny"
    trainer.push_to_hub()
    card = card_of(online)
    assert card.data.base_model == "someone/tiny"
    assert "- learning_rate: 0.0123" in card.text
    for name in ("README.md", "adapter_config.json"):
        assert str(house).encode() not in online.files(REPO)[name]


def test_a_hub_token_of_a_trainer_stays_in_its_folder_and_a_card_without_our_import_is_told(
    house: Path, online: Hub, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32)
    base.config._name_or_path = base.name_or_path = "someone/tiny"
    options = {"hub_model_id": "me/theirs", "report_to": "none", "use_cpu": True, "hub_token": TOKEN}
    model = get_peft_model(base, SealConfig(task_type="CAUSAL_LM"))
    transformers.Trainer(model, transformers.TrainingArguments(str(tmp_path / "out"), **options)).push_to_hub()
    # If not, docs/hub.md is out of date.
    assert [name for name, data in online.files("me/theirs").items() if TOKEN.encode() in data] == [
        "training_args.bin"
    ]

    (tmp_path / "out" / "README.md").write_text("---\ntags: [trl]\n---\n# Model Card for sft\n")  # as TRL's trainers
    with pytest.warns(UserWarning, match="says nothing of seal_peft.* Write `import seal_peft`.* or delete the file"):
        push(tmp_path / "out")
    assert TOKEN.encode() not in b"".join([*online.files(REPO).values(), *contents(tmp_path / "cache").values()])
    assert "# Model Card for sft" in card_of(online).text
    (tmp_path / "out" / "README.md").unlink()
    push(tmp_path / "out")
    assert "import seal_peft" in card_of(online).text


def test_an_adapter_of_rope_alone_is_pushed_and_pulled(house: Path, online: Hub, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32)
    config = SealConfig(task_type="CAUSAL_LM", sites=(), rope_parameters={"rope_type": "yarn", "factor": 4.0})
    model = get_peft_model(base, config).eval()
    seal_peft.save_adapter(model, tmp_path / "yarn")
    push(tmp_path / "yarn")
    assert online.files(REPO).keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert "it brings a context extension alone" in card_of(online).text
    base = AutoModelForCausalLM.from_pretrained(house / "model", dtype=torch.float32)
    pulled = PeftModel.from_pretrained(base, REPO).eval()
    assert pulled.get_base_model().config.rope_parameters["rope_type"] == "yarn"
    torch.testing.assert_close(models.logits(pulled), models.logits(model))


def test_a_new_repository_is_private_if_asked(adapter: Path, online: Hub) -> None:
    push(adapter, private=True)
    seal_peft.push(adapter, "me/open", base_model="someone/tiny")
    assert (online.private[REPO], online.private["me/open"]) == ("private", None)


def test_pushing_again_replaces_what_changed(adapter: Path, online: Hub) -> None:
    push(adapter)
    push(adapter, license="apache-2.0")
    assert card_of(online).data.license == "apache-2.0"


# --- faults --------------------------------------------------------------------------------------------------------

FAULTS = {
    "401": (
        [Fault("POST .*/create", 401), Fault("GET /api/models", 401)],
        r"\(401\)\. You are not logged in.* `hf auth login`",
    ),
    "403": ([Fault("POST .*/create", 403), Fault("GET /api/models", 403)], "write permission"),
    "404": ([Fault("POST .*/commit", 404)], "check repo_id"),
    "429": ([Fault("POST .*/commit", 429)], "wait some minutes"),
    "503": ([Fault("POST .*/commit", 503)], r"\(503\).* The Hub has trouble of its own: push again later"),
    "503 at once": ([Fault("POST .*/create", 503)], "push again later"),
    "dropped": ([Fault("POST .*/commit")], "connection broke: push again"),
    "dropped at once": ([Fault("POST .*/create")], "connection broke: push again"),
    "half a commit": ([Fault("POST .*/commit", after=2000)], "connection broke: push again"),
    "half the weights": ([Fault("PUT /blobs", after=100, times=99)], "connection broke: push again"),
    "weights refused": ([Fault("PUT /blobs", 403)], "write permission"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_failed_push_loses_nothing_says_what_to_do_and_can_be_repeated(
    adapter: Path,
    online: Hub,
    name: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    without_matplotlib: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)  # between its own attempts
    faults, advice = FAULTS[name]
    push(adapter, license="mit")  # an older state, which must stay
    earlier, weights = online.files(REPO), (adapter / "adapter_model.safetensors").read_bytes()
    online.blobs.clear()
    online.faults += [Fault(**vars(fault)) for fault in faults]
    with pytest.raises(OSError, match=advice) as caught:
        push(adapter, license="apache-2.0")
    assert "Nothing was lost" in str(caught.value)
    assert online.files(REPO) == earlier
    assert (adapter / "adapter_model.safetensors").read_bytes() == weights
    assert seal_peft.scales(adapter)
    online.faults.clear()
    push(adapter, license="apache-2.0")
    assert card_of(online).data.license == "apache-2.0"
    written = b"".join(contents(adapter).values())
    captured = capfd.readouterr()
    everything = f"{caught.value!r} {captured.out} {captured.err} {caplog.text}".encode() + written
    assert TOKEN.encode() not in everything


def test_without_a_token_the_message_tells_how_to_log_in(
    adapter: Path, online: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="hf auth login"):
        push(adapter)


def test_offline_mode_is_named(adapter: Path) -> None:
    with pytest.raises(OSError, match="HF_HUB_OFFLINE"):
        push(adapter)


def test_the_command_line_pushes_in_a_process_of_its_own_and_the_token_shows_nowhere(
    house: Path, adapter: Path, online: Hub, tmp_path: Path
) -> None:
    code = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from seal_peft.cli import main
codes = [main(sys.argv[1:]) for _ in range(2)]
print(codes, sys.argv[0])
"""
    online.faults.append(Fault("POST .*/commit", 503))
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": online.url, "HF_TOKEN": TOKEN}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}
    metrics = ["--metrics_file", house / "eval" / "metrics.json", "--system", "ours"]
    words = ["push", "--adapter", adapter, "--repo_id", REPO, "--base_model", "someone/tiny", *metrics]
    ended = python(code, *words, environment=environment)
    assert "[1, 0]" in ended.stdout, ended.stderr
    assert re.search("seal-peft push: error: The push to me/my-adapter failed .503.", ended.stderr)
    assert "/commit/" in ended.stdout
    assert TOKEN not in ended.stdout + ended.stderr
    for folder in (tmp_path, house):
        assert not [name for name, content in contents(folder).items() if TOKEN.encode() in content]
    assert TOKEN.encode() not in b"".join(online.files(REPO).values())


# --- refusals before anything is sent --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"repo_id": "adapter"}, "use owner/name"),
        ({"repo_id": "a/b/c"}, "a/b/c"),
        (
            {"base_model": None},
            "is a folder of this machine .* as base_model .--base_model",
        ),
        ({"base_model": "/no/hub/id"}, "no/hub/id"),
        ({"adapter": "nowhere"}, "nowhere is not an adapter folder: there is no adapter_config.json"),
        ({"system": "theirs"}, "has no results of theirs, only of base, ours"),
        ({"metrics_file": "run.json"}, "is not a metrics.json"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(
    house: Path, adapter: Path, online: Hub, options: dict[str, Any], complaint: str
) -> None:
    if options.get("metrics_file"):
        options = {"metrics_file": adapter / "run.json"}
    given = {"adapter": adapter, "repo_id": REPO, "base_model": "someone/tiny", "system": "ours"}
    given |= {"metrics_file": house / "eval" / "metrics.json", **options}
    before = contents(adapter)
    with pytest.raises(ValueError, match=complaint):
        seal_peft.push(**given)
    assert not online.requests
    assert contents(adapter) == before


def test_metrics_that_are_older_than_the_adapter_are_refused(house: Path, adapter: Path, online: Hub) -> None:
    run = json.loads((adapter / "run.json").read_text())
    write_json(adapter / "run.json", run | {"date": "2999-01-01T00:00:00+00:00"})
    with pytest.raises(ValueError, match=r"was trained after that \(2999-.* Evaluate it again"):
        push(adapter, metrics_file=house / "eval" / "metrics.json", system="ours")


def test_broken_and_foreign_adapters_are_refused(adapter: Path, online: Hub, house: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="cut off or damaged"):
        push(adapter)
    weights.write_bytes(whole)
    base = AutoModelForCausalLM.from_pretrained(house / "model")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(adapter.parent / "lora")
    with pytest.raises(ValueError, match="an adapter of another method"):
        push(adapter.parent / "lora")
    assert not online.requests


def test_the_trainers_own_push_and_token_flags_are_refused(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--model_name_or_path", house / "model", "--train_file", "t", "--output_dir", tmp_path / "new"]
    assert seal(*words, "--hub_token", TOKEN) == 2
    assert seal(*words, "--push_to_hub", "true") == 2
    assert seal("push", "--adapter", tmp_path, "--repo_id", REPO, "--token", TOKEN) == 2
    shown = capsys.readouterr().err
    assert "seal-peft push" in shown
    assert TOKEN not in shown


def test_a_missing_folder_is_one_line_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert seal("push", "--adapter", tmp_path, "--repo_id", REPO) == 1
    assert "is not an adapter folder" in error_of(capsys)
    assert hub.PushArguments("a", "b/c").datasets == []
