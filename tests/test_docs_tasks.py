"""The page about tasks: its examples run, and its table is complete."""

import re
from pathlib import Path

import pytest

import tokenizers_for_tests as tokenizers_
from seal_peft.data import encode_training, read_samples
from seal_peft.tasks import TASKS, get_task
from stages import save_model, seal

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "tasks.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory):
    """What the page's blocks define, run in order in an empty folder; the new row leaves the table at the end."""
    defined = {"__name__": "page", "tokenizer": tokenizers_.words(tokenizers_.CHATML)}
    known = set(TASKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for block in re.findall(r"^```python\n(.+?)^```$", PAGE, re.MULTILINE | re.DOTALL):
            exec(compile(block, "docs/tasks.md", "exec"), defined)
        model = save_model(Path("model"), weights=False, max_position_embeddings=4096)
        (commands,) = (
            part for part in re.findall(r"^```bash\n(.+?)^```$", PAGE, re.M | re.S) if "--task_file" in part
        )
        for command in commands.splitlines():
            words = command.replace("smollm2", str(model)).split()[1:]
            assert seal(*words) == 0
        yield (
            defined
            | {"generated": read_samples("birthdays.jsonl"), "train": read_samples("train.jsonl")}
            | {"test": read_samples("test.jsonl")}
        )
    for name in set(TASKS) - known:
        del TASKS[name]


def test_every_task_has_its_place_in_the_documents_and_no_other_is_listed() -> None:
    listed = re.findall(r"^\| `(\w+)` \| .+\| .+\| .+\|$", PAGE.partition("\n## ")[0], re.MULTILINE)
    pages = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    assert "needle_multi" in listed
    assert set(listed) <= set(TASKS)
    assert not [name for name in TASKS if f"`{name}`" not in pages]


def test_the_new_task_of_the_page_keeps_the_promises_of_all_tasks(names) -> None:
    task = get_task("birthdays")
    for seed in range(20):
        for split in ("train", "test"):
            shorter, longer = (task.make(seed=seed, size=n, depth=1, split=split, questions=3) for n in (20, 21))
            assert shorter.messages[0]["content"].count(shorter.answers[0]) == 1
            assert (shorter.answers, shorter.target) == (longer.answers, longer.target)
            assert task.score(shorter.target, shorter.answers) == 1.0
            assert task.make(seed=seed, depth=shorter.depth, **shorter.meta) == shorter
    with pytest.raises(ValueError, match="size=2 sentences cannot answer questions=3"):
        task.make(seed=0, size=2, depth=0.5, split="test", questions=3)


def test_the_files_of_the_page_are_read_and_can_be_trained_on(names) -> None:
    (own,) = names["samples"]
    assert len(names["generated"]) == 10
    assert get_task(own.task).score("It is the landlord.", own.answers) == 1.0
    for sample in [own, *names["generated"]]:
        assert any(label != -100 for label in encode_training(sample, names["tokenizer"])["labels"])


def test_the_ten_orders_of_the_page_make_training_and_test_data(names) -> None:
    assert (len(names["train"]), len(names["test"])) == (50, 80)
    used = [{order for sample in names[split] for order in sample.meta["examples"]} for split in ("train", "test")]
    assert [sorted(orders) for orders in used] == [[f"order-{7101 + n}" for n in range(k, 10, 2)] for k in (0, 1)]
    for sample in [*names["train"], *names["test"]]:
        assert get_task(sample.task).score(sample.target, sample.answers) == 1.0
