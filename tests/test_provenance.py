"""What results files say about where they come from."""

import importlib.util
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from seal_peft import __version__, provenance


def test_a_copy_without_git_says_the_commit_that_it_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("seal_peft.copied", shutil.copy(provenance.__file__, tmp_path))
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    monkeypatch.delenv("SEAL_PEFT_COMMIT", raising=False)
    assert copied.provenance()["commit"] is None
    monkeypatch.setenv("SEAL_PEFT_COMMIT", "0" * 40)
    assert copied.provenance()["commit"] == "0" * 40


def test_a_source_tree_that_is_not_installed_says_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(provenance, "version", version)
    versions = provenance.provenance()["versions"]
    assert (versions["seal-peft"], versions["torch"]) == (__version__, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="names the GPU")
@pytest.mark.parametrize(("threads", "name"), [(1, "CPU, 1 thread"), (2, "CPU, 2 threads")])
def test_the_threads_of_a_cpu_are_counted(threads: int, name: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert provenance.provenance()["device"] == name
    finally:
        torch.set_num_threads(before)


def test_results_name_the_devices_commits_and_versions_of_the_jobs_not_of_the_call_that_brings_them_together() -> None:
    here = {"device": "H100", "commit": "b", "versions": {"torch": "2.11.0", "seal-peft": None}}
    there = {"device": "H200", "commit": "b", "versions": {"torch": "2.10.0", "seal-peft": None}}
    source = provenance.source_of([there, here, here])
    assert (source["device"], source["commit"]) == ("H100, H200", "b")
    assert source["versions"] == {"torch": "2.10.0, 2.11.0", "seal-peft": None}
