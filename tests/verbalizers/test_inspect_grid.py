"""InSPEcT's settings: which pair, which examples, where a selection comes from. The texts themselves: tests/oracles."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import ArtifactError, ConfigError
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers.base import create, for_bank, random_like, settings_of
from lm_eval_softverb.verbalizers.inspect_grid import Inspect, Selection, all_pairs, choose_examples, examples


def prompts(*lengths):
    return [SoftPrompt(torch.randn(n, 32, generator=torch.Generator().manual_seed(n))) for n in lengths]


def test_the_fixed_pair_scales_with_depth():
    assert Inspect().pair(32, "labels") == (22, 1)
    assert Inspect().pair(30, "labels") == (21, 1)
    assert Inspect().pair(3, "labels") == (1, 1)
    assert Inspect().pair(1, "labels") == (-1, -1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source_layer": 1}, "both"),
        ({"source_layer": 1, "target_layer": 0, "selection": "x"}, "not both"),
        ({"injection": "layer1"}, "Did you mean 'layer0'"),
        ({"mode": "sequental"}, "Did you mean 'sequential'"),
        ({"source_layer": "one"}, "expected int"),
        ({"source_layr": 1}, "Did you mean 'source_layer'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        create("inspect", **settings)


def test_values_from_a_command_line_are_read_as_their_type():
    assert create("inspect", source_layer="-1", target_layer=2.0) == Inspect(source_layer=-1, target_layer=2)
    assert settings_of(create("inspect", seed="3"))["seed"] == 3
    with pytest.raises(ConfigError, match="Did you mean 'inspect'"):
        create("inspct")


@pytest.mark.parametrize("pair", [(-2, 0), (0, 2), (5, 0)])
def test_a_pair_outside_of_the_model(pair):
    with pytest.raises(ConfigError, match="-1 to 1"):
        Inspect(source_layer=pair[0], target_layer=pair[1]).pair(3, "labels")


def test_selection_round_trip_and_use(tmp_path):
    file = tmp_path / "selection.json"
    Selection({"labels": (4, -1)}, 8, {"labels": {"objective": "f1"}}).save(file)
    assert Selection.load(file) == Selection({"labels": (4, -1)}, 8, {"labels": {"objective": "f1"}})
    assert Inspect(selection=str(file)).pair(8, "labels") == (4, -1)
    for layers, kind in ((9, "labels"), (8, "instructions")):
        with pytest.raises(ConfigError, match="softverb select"):
            Inspect(selection=str(file)).pair(layers, kind)


@pytest.mark.parametrize("content", ["[]", '{"pairs": {}, "layers": 3, "info": {}}', '{"pairs": {"labels": [1]}, "layers": 3}',
                                     '{"pairs": {"label": [1, 2]}, "layers": 3, "info": {}}'])  # fmt: skip
def test_a_malformed_selection(tmp_path, content):
    file = tmp_path / "selection.json"
    file.write_text(content)
    with pytest.raises(ArtifactError, match="selection"):
        Selection.load(file)


def test_a_selection_that_is_not_there():
    with pytest.raises(ArtifactError, match="no selection file"):
        Selection.load("smollm3")


def test_examples_are_seeded_and_kept_off_the_evaluation():
    first = choose_examples("labels", 0)
    assert len(set(first)) == 3 and first == choose_examples("labels", 0)
    assert first != choose_examples("labels", 1)
    banned = first[1].labels[0]
    kept = choose_examples("labels", 0, avoid=["no such word", banned.upper()])
    assert kept[0] == first[0] and kept[1] == first[2]  # the others stay
    with pytest.raises(ConfigError, match="share no label"):
        choose_examples("labels", 0, avoid=[label for x in examples("labels")[2:] for label in x.labels])


def test_a_bank_s_labels_are_avoided():
    first = choose_examples("labels", 0)[0]
    entries = [{"labels": list(first.labels)}, {"instruction": "…"}]
    verbalizer = for_bank(Inspect(), entries)
    assert first not in verbalizer.examples("labels")
    assert for_bank(Inspect(avoid="x"), entries) == Inspect(avoid="x")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_texts_of_many_prompts_are_those_of_each_alone(tiny, name):
    model = Backbone.load(tiny(name, window=256), dtype="float32", device="cpu")
    some = prompts(3, 5, 3)
    verbalizer = Inspect(source_layer=0, target_layer=1)
    together = verbalizer.verbalize(model, some, kind="labels", max_new_tokens=6)
    alone = [verbalizer.verbalize(model, [p], kind="labels", max_new_tokens=6)[0] for p in some]
    assert [t[0].text for t in together] == [t[0].text for t in alone]
    assert [t[0].confidence for t in together] == pytest.approx([t[0].confidence for t in alone], rel=1e-4)
    for found in together:
        assert 0 < found[0].confidence <= 1 and not math.isnan(found[0].confidence)
        assert found[0].details["pair"] == "given" and len(found[0].details["examples"]) == 3
    json.dumps([t[0].to_json() for t in together])


def test_seed_and_placeholder_change_the_text(tiny):
    """Placeholders matter below the target layer only."""
    model, [prompt] = Backbone.load(tiny("llama", window=256), dtype="float32", device="cpu"), prompts(4)

    def text(pair, **settings):
        chosen = Inspect(source_layer=pair[0], target_layer=pair[1], **settings)
        return chosen.verbalize(model, [prompt], kind="instructions", max_new_tokens=10)[0][0].text

    assert text((0, 1)) != text((0, 1), placeholder="§")
    assert text((0, -1)) == text((0, -1), placeholder="§")
    assert text((0, -1)) != text((0, -1), seed=1)


def test_a_target_prompt_longer_than_the_context_is_refused(backbone):
    with pytest.raises(ConfigError, match="do not fit the 96 tokens"):
        Inspect().verbalize(backbone("gpt2"), prompts(3), kind="labels", max_new_tokens=60)


def test_all_pairs():
    assert all_pairs(2) == [(-1, -1), (-1, 0), (0, -1), (0, 0)]


def test_random_control_keeps_norms():
    [a, b] = random_like(prompts(3, 5), seed=1)
    for mine, theirs in zip((a, b), prompts(3, 5), strict=True):
        torch.testing.assert_close(mine.embeddings.norm(dim=-1), theirs.embeddings.norm(dim=-1))
        assert not torch.allclose(mine.embeddings, theirs.embeddings)
    assert torch.equal(random_like(prompts(3, 5), seed=1)[1].embeddings, b.embeddings)
    assert not torch.equal(random_like(prompts(3), seed=2)[0].embeddings, a.embeddings)
