"""F07 full disk, F08 unwritable folder: the old file is intact, nothing is left behind, the message says where and how much."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from lm_eval_softverb import storage
from lm_eval_softverb.bank import MANIFEST, Bank
from lm_eval_softverb.errors import ArtifactError, OutputError
from lm_eval_softverb.models.ledger import Ledger
from lm_eval_softverb.prompt import SoftPrompt


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(params=["replace", "fsync", "fdopen"])
def full_disk(request, monkeypatch):
    """The disk is full at one of the steps of a write."""
    return lambda: monkeypatch.setattr(storage.os, request.param, full)


def prompt(seed):
    return SoftPrompt(torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)))


def test_f07_full_disk_leaves_the_old_file(tmp_path, full_disk):
    path = tmp_path / "results.json"
    storage.write_json(path, {"old": 1})
    before = files(tmp_path)
    full_disk()
    with pytest.raises(OutputError) as caught:
        storage.write_json(path, {"new": "x" * 5000})
    assert files(tmp_path) == before
    assert str(path) in str(caught.value)
    assert "5,016 bytes" in str(caught.value)
    assert "No space left" in str(caught.value)


def test_f07_full_disk_leaves_an_old_prompt_usable(tmp_path, full_disk):
    folder = prompt(0).save(tmp_path / "p")
    before = files(folder)
    full_disk()
    with pytest.raises(OutputError, match=r"adapter_model\.safetensors"):
        prompt(1).save(folder)
    assert files(folder) == before
    assert SoftPrompt.load(folder).id == prompt(0).id


def test_f07_a_disk_that_fills_within_a_bank_leaves_no_manifest(tmp_path, monkeypatch):
    """The manifest is written last: an incomplete bank is not taken for a complete one."""
    left, real = [2], os.replace

    def fills(source, target):
        left[0] -= 1
        return real(source, target) if left[0] >= 0 else full()

    monkeypatch.setattr(storage.os, "replace", fills)
    with pytest.raises(OutputError):
        Bank.save(tmp_path / "bank", [(prompt(i), {"prompt_id": f"p{i}"}) for i in range(3)])
    assert not (tmp_path / "bank" / MANIFEST).exists()
    with pytest.raises(ArtifactError, match="incomplete"):
        Bank.load(tmp_path / "bank")


def test_f07_full_disk_stops_the_ledger_and_keeps_its_answers(tmp_path):
    ledger = Ledger(tmp_path / "a.db")
    ledger.put("before", [1.0, True])
    ledger._db.execute("PRAGMA max_page_count = 6")
    with pytest.raises(OutputError, match=r"a\.db.*full") as caught:
        for i in range(100):
            ledger.put(str(i), "x" * 500)
    assert "run the same command again" in str(caught.value)
    ledger.close()
    again = Ledger(tmp_path / "a.db")
    assert again.quarantined is None
    assert again.get("before") == [1.0, True]


def test_f07_positive_control_with_room_everything_is_written(tmp_path):
    storage.write_json(tmp_path / "results.json", {"new": 1})
    assert storage.read_json(tmp_path / "results.json") == {"new": 1}
    ledger = Ledger(tmp_path / "a.db")
    for i in range(100):
        ledger.put(str(i), "x" * 500)
    assert ledger.get("99") == "x" * 500


def test_f08_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="Choose another folder") as caught:
        storage.require_writable(tmp_path / "file" / "out")
    assert str(tmp_path / "file" / "out") in str(caught.value)
    with pytest.raises(OutputError):
        Ledger(tmp_path / "file" / "out" / "a.db")
    with pytest.raises(OutputError):
        prompt(0).save(tmp_path / "file" / "out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_f08_a_read_only_folder_is_refused(tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        storage.require_writable(tmp_path / "out")


def test_f08_a_read_only_file_system_is_refused(tmp_path, monkeypatch):
    def read_only(*_args, **_kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(storage.tempfile, "NamedTemporaryFile", read_only)
    with pytest.raises(OutputError, match="Read-only file system"):
        storage.require_writable(tmp_path / "out")


def test_f08_a_cache_path_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / "a.db").mkdir()
    with pytest.raises(OutputError, match="--use_cache"):
        Ledger(tmp_path / "a.db")
    assert (tmp_path / "a.db").is_dir()


def test_f08_positive_control_a_new_folder_is_made(tmp_path):
    storage.require_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
