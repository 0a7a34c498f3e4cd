"""The house rules of the package: imports point one way, the method stands alone, files stay readable."""

import ast
from pathlib import Path

import pytest

import seal_peft
from stages import python

ROOT = Path(seal_peft.__file__).parent
MAX_LINES = 320
FILES = {
    path.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", "."): path for path in ROOT.rglob("*.py")
}
FILES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}


def imports(module: str) -> set[str]:
    """Return the full names of all modules that a module of ours imports anywhere in its text."""
    path, found = FILES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                origin = ".".join([*above, origin] if origin else above)
            names = {f"{origin}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else origin for name in names}
    return found - {module}


def room(module: str) -> str:
    """Return the folder or file directly under the package that a module belongs to."""
    return (module.split(".") + [""])[1]


def ours(module: str) -> set[str]:
    """Return the modules of the package that a module imports from other rooms."""
    return {name for name in imports(module) if name.split(".")[0] == "seal_peft" and room(name) != room(module)}


def modules_of(name: str) -> list[str]:
    return [module for module in FILES if room(module) == name]


def foreign(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(module)} - {"seal_peft"}


def test_this_reader_of_imports_sees_relative_absolute_and_nested_ones():
    assert "seal_peft.tuner.geometry" in imports("seal_peft.tuner.model")
    assert "seal_peft.tuner" in imports("seal_peft")
    assert "torch" in foreign("seal_peft.tuner.scale")


def test_the_tuner_could_move_into_peft():
    for module in modules_of("tuner"):
        allowed = {"seal_peft.context.switch"} if module == "seal_peft.tuner.model" else set()
        assert ours(module) <= allowed, module
        third_party = foreign(module) & {"datasets", "accelerate", "numpy", "tqdm", "rich", "matplotlib", "yaml"}
        assert not third_party, module


def test_context_extension_stands_alone():
    for module in modules_of("context"):
        assert not ours(module), module


def test_tasks_are_plain_python():
    for module in modules_of("tasks"):
        # Essays and questions stand in files of other packages, and `assets` only says where.
        assert ours(module) <= {"seal_peft.assets"}, module
        assert not foreign(module) & {"torch", "transformers", "peft", "numpy"}, module


def test_data_knows_tasks_but_no_method():
    forbidden = {"tuner", "context", "heads", "train", "evaluate", "report", "hub", "cli", "demo", "merge"}
    for module in [*modules_of("data"), *modules_of("tokens"), *modules_of("spans")]:
        assert not {room(name) for name in ours(module)} & forbidden, module


@pytest.mark.parametrize("stage", ["train", "evaluate", "heads"])
def test_stages_hand_each_other_files_not_objects(stage):
    others = {"train", "evaluate", "heads", "report", "hub", "cli", "demo", "merge", "reproduce"} - {stage}
    for module in modules_of(stage):
        assert not {room(name) for name in ours(module)} & others, module


@pytest.mark.parametrize("reader", ["report", "plots", "card", "describe", "hub"])
def test_readers_of_results_need_no_model(reader):
    forbidden = {"train", "evaluate", "heads", "data", "cli", "demo", "merge"}
    for module in modules_of(reader):
        assert not {room(name) for name in ours(module)} & forbidden, module


def test_nothing_but_the_entry_point_imports_the_command_line():
    assert {module for module in FILES if "seal_peft.cli" in imports(module)} <= {"seal_peft.__main__"}


def test_the_front_door_opens_only_the_method_until_something_is_saved_or_pushed():
    rooms = {room(name) for name in imports("seal_peft") if name.startswith("seal_peft")}
    assert rooms == {"tuner", "describe", "hub"}
    code = "import sys, seal_peft; print(*sys.modules); seal_peft.push; print('seal_peft.hub' in sys.modules)"
    loaded, hub = python(code).stdout.splitlines()
    assert {room(name) for name in loaded.split() if name.startswith("seal_peft")} == {"", "tuner", "context"}
    assert hub == "True"


def test_no_two_rooms_import_each_other():
    edges = {(room(module), room(name)) for module in FILES for name in ours(module) if name != "seal_peft"}
    reached = set(edges)
    while True:
        further = {(a, d) for a, b in reached for c, d in edges if b == c} - reached
        if not further:
            break
        reached |= further
    assert not {a for a, b in reached if a == b}


@pytest.mark.parametrize("module", FILES)
def test_a_file_is_one_room(module):
    lines = FILES[module].read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{module} has {lines} lines: if it grows past {MAX_LINES}, it is two files"
