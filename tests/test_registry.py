"""SEAL becomes a member of a closed enum: the one thing here that depends on the version of Python."""

import functools
import glob
import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from peft.utils import PeftType

from seal_peft.tuner import registry

CHECK = """
import copy
import json
import pickle
import sys

from enum_copy import PeftType, _add_enum_member

old = list(PeftType)
_add_enum_member("SEAL")
member = PeftType.SEAL
assert type(member) is PeftType and list(PeftType) == [*old, member]
assert member is PeftType("SEAL") is PeftType["SEAL"] is PeftType.__members__["SEAL"]
assert (member.name, member.value, str.__str__(member)) == ("SEAL", "SEAL", "SEAL")
assert repr(member) == "<PeftType.SEAL: 'SEAL'>"
assert member == "SEAL" and {"SEAL": 1}[member] == 1 and member in PeftType and isinstance(member, str)
for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    assert pickle.loads(pickle.dumps(member, protocol)) is member
assert copy.copy(member) is copy.deepcopy(member) is copy.deepcopy({"type": member})["type"] is member
assert json.dumps({"peft_type": member}) == '{"peft_type": "SEAL"}'
assert PeftType.LORA is old[[m.name for m in old].index("LORA")]
try:
    PeftType("NOTHING")
except ValueError:
    print(sys.version_info[:2])
"""


@functools.cache
def interpreters() -> dict[str, str]:
    """Version -> path of every Python from 3.11 on that is on the path or in pyenv, one per minor version."""
    names = [f"python3.{minor}" for minor in range(11, 20)]
    found = [sys.executable, *filter(None, map(shutil.which, names))]
    found += glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin/python"))
    versions: dict[str, str] = {}
    for path in found:
        done = subprocess.run([path, "--version"], capture_output=True, text=True)
        version = re.match(r"Python (3\.(\d+))", done.stdout)
        if version and int(version[2]) >= 11:
            versions.setdefault(version[1], path)
    return versions


@pytest.mark.parametrize("version", [f"3.{minor}" for minor in range(11, 16)])
def test_the_enum_takes_a_member_on_every_python(version, tmp_path):
    if version not in interpreters():
        pytest.skip(f"there is no Python {version} on this machine")
    members = "\n".join(f'    {member.name} = "{member.value}"' for member in PeftType if member.name != "SEAL")
    function = textwrap.dedent(inspect.getsource(registry._add_enum_member))
    (tmp_path / "enum_copy.py").write_text(
        f"import enum\n\n\nclass PeftType(str, enum.Enum):\n{members}\n\n\n{function}", encoding="utf-8"
    )
    command = [interpreters()[version], "-B", "-W", "error", "-c", CHECK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"(3, {version[2:]})"
