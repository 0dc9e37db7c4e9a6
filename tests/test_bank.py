"""Banks: many prompts in one folder, complete when the manifest is there."""

from __future__ import annotations

import json

import pytest
import torch

from lm_eval_softverb.bank import MANIFEST, Bank
from lm_eval_softverb.errors import ArtifactError, DataError
from lm_eval_softverb.frame import Frame
from lm_eval_softverb.prompt import SoftPrompt


def prompt(seed, n=3):
    return SoftPrompt(torch.randn(n, 32, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def folder(tmp_path):
    items = [(prompt(0), {"task": "a"}), (prompt(1, 5), {"task": "b", "prompt_id": "p1", "split": "train"})]
    return Bank.save(tmp_path / "bank", items)


def rewrite(folder, change):
    rows = [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]
    change(rows)
    (folder / MANIFEST).write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_round_trip(folder):
    bank = Bank.load(folder)
    assert [p.id for p in bank.prompts] == [prompt(0).id, prompt(1, 5).id]
    assert [e["task"] for e in bank.entries] == ["a", "b"]
    assert bank.entries[0]["prompt_id"] == prompt(0).id
    assert bank.entries[1]["split"] == "train"


def test_a_prompt_saved_by_itself_is_a_peft_folder(folder, tmp_path):
    for found, expected in zip(Bank.load(folder).prompts, (prompt(0), prompt(1, 5)), strict=True):
        assert SoftPrompt.load(found.save(tmp_path / found.id)).id == expected.id


def test_frame_info_and_base_model_come_back(tmp_path, backbone):
    made = SoftPrompt(prompt(0).embeddings, Frame("user_end", "Please §."), backbone("llama").fingerprint, {"losses": [1.5]})
    folder = Bank.save(tmp_path / "bank", [(made, {"prompt_id": "p"})])
    [found] = Bank.load(folder).prompts
    assert (found.id, found.frame, dict(found.info)) == (made.id, made.frame, {"losses": [1.5]})
    assert found.fingerprint.differences(made.fingerprint) == []
    assert (folder / "manifest.jsonl").stat().st_size < 1000 < (folder / "bank.json").stat().st_size


def test_banks_are_joined_in_their_order(folder, tmp_path):
    more = Bank.load(Bank.save(tmp_path / "more", [(prompt(2), {"prompt_id": "p2"}), (prompt(3), {"prompt_id": "p1"})]))
    both = Bank.joined([Bank.load(folder), more])
    assert [p.id for p in both.prompts] == [prompt(0).id, prompt(1, 5).id, prompt(2).id, prompt(3).id]
    assert [e["prompt_id"] for e in both.entries] == [prompt(0).id, "p1", "p2", "more/p1"]
    assert both.prompts[3].source.endswith("#more/p1") and both.prompts[1].source.endswith("#p1")  # inputs go by this name
    assert both.entries[1]["task"] == "b" and both.prompt("more/p1").id == prompt(3).id
    with pytest.raises(ArtifactError, match="would be a second 'more/p2'"):
        Bank.joined([more, more, more])


def test_one_base_model_and_one_name_each(tmp_path, backbone):
    first, second = (
        SoftPrompt(prompt(i).embeddings, fingerprint=backbone(n).fingerprint) for i, n in ((0, "llama"), (1, "qwen2"))
    )
    with pytest.raises(ArtifactError, match="one frozen model"):
        Bank.save(tmp_path / "bank", [(first, {}), (second, {})])
    with pytest.raises(ArtifactError, match="one frozen model"):
        Bank.save(tmp_path / "bank", [(first, {}), (prompt(2), {})])
    with pytest.raises(ArtifactError, match="names must be unique"):
        Bank.save(tmp_path / "bank", [(first, {"prompt_id": "p"}), (prompt(2), {"prompt_id": "p"})])
    assert not (tmp_path / "bank" / MANIFEST).exists()


def test_swapped_rows_are_noticed(folder):
    """The names are those of the manifest, the rows are not."""
    from lm_eval_softverb import storage

    storage.write_tensors(folder / "prompts.safetensors", {prompt(0).id: prompt(7).embeddings, "p1": prompt(1, 5).embeddings})
    with pytest.raises(ArtifactError, match="not those the manifest was written for"):
        Bank.load(folder)


@pytest.fixture
def folders(tmp_path):
    """A bank of folders, one per prompt."""
    root = tmp_path / "folders"
    for i in range(2):
        prompt(i).save(root / f"p{i}")
    (root / MANIFEST).write_text("".join(json.dumps({"prompt_id": f"p{i}", "path": f"p{i}"}) + "\n" for i in range(2)))
    return root


def test_prompts_may_be_folders_of_their_own(folders):
    assert [p.id for p in Bank.load(folders).prompts] == [prompt(0).id, prompt(1).id]


def test_one_prompt_by_name(folder):
    assert Bank.load(folder).prompt("p1").id == prompt(1, 5).id
    with pytest.raises(ArtifactError, match="Did you mean 'p1'"):
        Bank.load(folder).prompt("p2")


def test_prompts_are_found_by_document_field_then_by_task(folder):
    bank = Bank.load(folder)
    assert bank.place({"which": "p1"}, "a", "which") == 1
    assert bank.place({"which": prompt(0).id}, None, "which") == 0
    assert bank.place({"other": 1}, "b", "which") == 1
    assert bank.place({}, "a", "which") == 0


@pytest.mark.parametrize(("doc", "task"), [({}, "c"), ({"which": "p2"}, "a"), ({}, None), ({"which": None}, "a")])
def test_a_missing_prompt_is_an_error_that_says_what_was_asked(folder, doc, task):
    with pytest.raises(ArtifactError, match=r"no prompt for .*(field|task)"):
        Bank.load(folder).place(doc, task, "which")


def test_a_task_with_several_prompts_needs_the_document_to_choose(folder):
    rewrite(folder, lambda rows: rows[0].update(task="b"))
    bank = Bank.load(folder)
    with pytest.raises(ArtifactError, match=r"2 prompts for task 'b'.*'which'"):
        bank.place({}, "b", "which")
    assert bank.place({"which": prompt(0).id}, "b", "which") == 0


def test_without_a_manifest_the_bank_is_incomplete(folder):
    (folder / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="written last"):
        Bank.load(folder)


def test_an_empty_manifest_is_refused(folder):
    (folder / MANIFEST).write_text("\n")
    with pytest.raises(ArtifactError, match="no prompts"):
        Bank.load(folder)


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "p1/../../elsewhere", "a\x00b"])
def test_paths_stay_inside_the_bank(folder, path):
    prompt(2).save(folder.parent / "elsewhere")
    rewrite(folder, lambda rows: rows[1].update(path=path))
    with pytest.raises(ArtifactError, match=rf"{MANIFEST}:2"):
        Bank.load(folder)


def test_links_out_of_the_bank_are_refused(folder):
    prompt(2).save(folder.parent / "elsewhere")
    (folder / "link").symlink_to(folder.parent / "elsewhere")
    rewrite(folder, lambda rows: rows[1].update(path="link"))
    with pytest.raises(ArtifactError, match="leaves the bank"):
        Bank.load(folder)


@pytest.mark.parametrize("change", [{"path": None}, {"path": 3}, {"prompt_id": None}])
def test_entries_need_a_name_and_a_path(folder, change):
    rewrite(folder, lambda rows: rows[0].update(change))
    with pytest.raises(ArtifactError, match=rf"{MANIFEST}:1"):
        Bank.load(folder)


def test_a_torn_manifest_line_is_named(folder):
    with (folder / MANIFEST).open("a") as f:
        f.write('{"prompt_id": "p2", "pa')
    with pytest.raises(DataError, match=rf"{MANIFEST}:3"):
        Bank.load(folder)


def test_a_missing_prompt_folder_is_an_artifact_error(folder):
    rewrite(folder, lambda rows: rows[0].update(path="gone"))
    with pytest.raises(ArtifactError, match="gone"):
        Bank.load(folder)


def test_two_entries_of_one_name_are_refused(folder):
    """The second would silently replace the first."""
    rewrite(folder, lambda rows: rows[0].update(prompt_id="p1"))
    with pytest.raises(ArtifactError, match="p1"):
        Bank.load(folder)
