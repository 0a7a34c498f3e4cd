"""What the pages will say once a results file is there."""

import importlib.util
from pathlib import Path
from typing import Any

_path = Path(__file__).parents[1] / "results" / "render.py"
_spec = importlib.util.spec_from_file_location("render", _path)
assert _spec and _spec.loader
render = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(render)


def filled(file: str, data: dict[str, Any], pattern: str = "") -> list[str]:
    """Render every figure and table of all pages that comes from a file; a field that it lacks is an error."""
    jinja = render.environment()
    marks = [mark for page in render.PAGES for mark in render.MARK.finditer(page.read_text(encoding="utf-8"))]
    own = [mark[2] for mark in marks if mark[1] == file]
    assert own, f"No page shows {file}."
    return [jinja.from_string(template).render(data, data=data) for template in own if pattern in template]


def blocks(file: str, data: dict[str, Any]) -> list[str]:
    """Render what stands on lines of its own, such as tables."""
    return filled(file, data, "\n")
