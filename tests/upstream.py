"""Which test files can tell one version of PEFT and transformers from another: those that reach them by imports.

`make test-floor` runs only these; the others would run the very same code as in `make test`.
"""

import ast
import functools
from pathlib import Path

import seal_peft

_TESTS, _PACKAGE = Path(__file__).parent, Path(seal_peft.__file__).parent
_UPSTREAM = {"accelerate", "huggingface_hub", "peft", "tokenizers", "transformers"}


@functools.cache
def reaches_upstream(file: Path) -> bool:
    """Whether a test file imports one of these libraries, itself or by way of our modules.

    A test, or a helper of tests, may import them anywhere in its text. In the package only what is imported at once
    counts, not what a function imports when it is called; nor does `seal_peft/__init__.py` count on the way to a
    module below it: it imports the method for every module.
    """
    seen: set[Path] = set()
    waiting = [file]
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in _imported(file):
            if name.partition(".")[0] in _UPSTREAM:
                return True
            waiting += _files_of(name)
    return False


@functools.cache
def _imported(file: Path) -> set[str]:
    """Full names of what a file imports: of `from a import b`, both `a` and `a.b`."""
    found: set[str] = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body if file.is_relative_to(_PACKAGE) else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                package = file.relative_to(_PACKAGE.parent).parts[: -node.level]
                origin = ".".join([*package, origin] if origin else package)
            found |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
    return found


def _files_of(name: str) -> list[Path]:
    if name == "seal_peft":
        return []
    root = _PACKAGE.parent if name.startswith("seal_peft.") else _TESTS
    path = root.joinpath(*name.split("."))
    return [found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()]
