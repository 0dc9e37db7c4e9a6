"""A model in process as a chat backend, and the filter by label likelihood."""

from __future__ import annotations

import pytest
import torch

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.endpoints.backends import ChatRequest
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.generators.classification import generate
from lm_eval_softverb.generators.config import ClassificationConfig
from lm_eval_softverb.generators.judging import QUESTION, LikelihoodJudge
from lm_eval_softverb.generators.local_chat import LocalChat

LABELS = ["red", "seven", "table"]
SENTENCES = ["It was like blood.", "He counted again and again.", "They sat around it.", "Nothing of the kind."]


@pytest.fixture(scope="module")
def wide(tiny):
    """A tiny model with room for questions, loaded in float64 so that batches do not matter at all."""
    return lambda name: Backbone.load(tiny(name, window=1024), dtype="float64", device="cpu")


def requests(temperature=1.0):
    texts = ["Name a colour.", "Name a number between one and ten, please.", "Say it.", "Name a colour."]
    return [ChatRequest.of(t, max_tokens=6, temperature=temperature, seed=i) for i, t in enumerate(texts)]


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_an_answer_is_the_same_alone_and_in_any_batch(name, temperature, wide):
    backbone = wide(name)
    asked = requests(temperature)
    together = LocalChat(backbone).complete(asked)
    alone = [LocalChat(backbone, batch_size=1).complete([r])[0] for r in asked]
    assert together == alone
    assert LocalChat(backbone).complete(asked[::-1]) == together[::-1]
    assert any(r.text for r in together)


def test_greedy_equals_stock_generation(wide):
    backbone = wide("llama")
    [reply] = LocalChat(backbone).complete([ChatRequest.of("Name a colour.", max_tokens=8)])
    chat = [{"role": "user", "content": "Name a colour."}]
    ids = backbone.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"]
    if int(ids[0, 0]) != 1:  # the template has no BOS; a text begins with one
        ids = torch.cat([torch.tensor([[1]]), ids], dim=1)
    out = backbone.model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert reply.prompt_tokens == ids.shape[1]
    assert (reply.text or "") == backbone.tokenizer.decode(out, skip_special_tokens=True).strip()


def test_seeds_decide_samples_and_settings_do_not_mix(wide):
    chat = LocalChat(wide("llama"))
    a, b, c = (ChatRequest.of("Say it.", max_tokens=12, temperature=2.0, seed=s) for s in (1, 2, 2**62))
    one, two, three = chat.complete([a, b, c])
    assert one.text != two.text and chat.complete([a])[0] == one and three.text
    greedy = ChatRequest.of("Say it.", max_tokens=5)
    mixed = chat.complete([a, greedy, b])
    assert (mixed[0], mixed[2]) == (one, two) and mixed[1] == chat.complete([greedy])[0]


def test_tokens_and_ends_are_reported(wide):
    chat = LocalChat(wide("llama"))
    request = ChatRequest.of("Say it.", max_tokens=3, temperature=1.0, seed=4)
    [reply] = chat.complete([request])
    assert reply.prompt_tokens == chat.count(request) > 5
    assert reply.completion_tokens <= 3 and reply.finish == ("length" if reply.completion_tokens == 3 else "stop")


def test_what_cannot_answer_is_refused(wide, backbone):
    with pytest.raises(ConfigError, match="do not fit"):
        LocalChat(wide("llama")).complete([ChatRequest.of("Say it.", max_tokens=5000)])
    with pytest.raises(ConfigError, match="decoder-only"):
        LocalChat(backbone("t5"))


def test_f35_memory_that_runs_out_halves_the_batch_and_is_counted(wide, monkeypatch):
    from lm_eval_softverb.endpoints.backends import Metered

    chat, answer = LocalChat(wide("llama")), LocalChat._answer

    def scarce(self, contexts, *rest):
        if len(contexts) > 1:
            raise RuntimeError("CUDA out of memory")
        return answer(self, contexts, *rest)

    whole = chat.complete(requests())
    monkeypatch.setattr(LocalChat, "_answer", scarce)
    meter = Metered(chat)
    assert meter.complete(requests()) == whole
    assert meter.usage.events["out_of_memory"] == 3


# --- the filter ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("labels", [LABELS, ["red", "redder", "table"]], ids=["by the first token", "by all tokens"])
def test_scores_equal_one_plain_pass_per_pair(name, labels, wide):
    backbone = wide(name)
    judge, chat = LikelihoodJudge(backbone), LocalChat(backbone)
    space = "" if backbone.tokenizer.chat_template else " "
    answers = [backbone.tokenizer.encode(space + label, add_special_tokens=False) for label in labels]
    decided = len({ids[0] for ids in answers}) == len(labels)
    assert decided == (labels == LABELS) and max(map(len, answers)) > 1
    for sentence, row in zip(SENTENCES, judge.scores(labels, SENTENCES), strict=True):
        text = QUESTION.format(labels=", ".join(labels), sentence=sentence)
        context = chat.encode([{"role": "user", "content": text}])
        for answer, score in zip(answers, row, strict=True):
            read = answer[:1] if decided else answer
            with torch.no_grad():
                logits = backbone.model(torch.tensor([[*context, *read]])).logits[0, len(context) - 1 : -1].log_softmax(-1)
            expected = float(logits.gather(1, torch.tensor([read]).T).sum())
            assert score == pytest.approx(expected, abs=1e-5)


def test_what_a_label_gets_for_every_sentence_does_not_count(wide, monkeypatch):
    judge = LikelihoodJudge(wide("llama"))
    rows = {"a": [-1.0, -5.0], "b": [-1.5, -4.0]}  # label "x" always wins unless its mean is taken off
    monkeypatch.setattr(judge, "scores", lambda _labels, sentences: [rows[s] for s in sentences])
    assert judge.start("xy")({"x": ["a"], "y": ["b"]}) == {"x": [True], "y": [True]}
    assert judge.start("xy")({"x": ["b"], "y": ["a"]}) == {"x": [False], "y": [False]}
    keep = judge.start("xy")
    assert keep({"x": ["a"], "y": ["b"]}) == {"x": [True], "y": [True]}
    assert keep({"x": ["a"], "y": []}) == {"x": [True], "y": []}  # what came before still counts
    assert judge.start("xy")({"x": [], "y": []}) == {"x": [], "y": []}
    assert judge.start("xy")({"x": ["a", "a", "a"], "y": ["b"]}) == {"x": [True] * 3, "y": [True]}


def test_a_margin_keeps_the_sure_ones(wide, monkeypatch):
    rows = {"sure": [-1.0, -9.0], "close": [-4.9, -5.1], "y": [-9.0, -1.0], "z": [-5.1, -4.9]}
    for margin, kept in ((0.0, [True, True]), (2.0, [True, False])):
        judge = LikelihoodJudge(wide("llama"), margin)
        monkeypatch.setattr(judge, "scores", lambda _labels, sentences: [rows[s] for s in sentences])
        assert judge.start("ab")({"a": ["sure", "close"], "b": ["y", "z"]}) == {"a": kept, "b": kept}
    with pytest.raises(ConfigError, match="margin"):
        LikelihoodJudge(wide("llama"), -1)


def test_words_of_many_tokens_are_not_known(wide):
    judge = LikelihoodJudge(wide("llama"))
    assert judge.knows("good") and not judge.knows("xylophonist")


def test_a_toy_goes_through_the_whole_machine(wide, tmp_path, monkeypatch):
    """A random model's words are refused, counted, and the run says so."""
    from lm_eval_softverb.endpoints.backends import Metered
    from lm_eval_softverb.errors import BackendError

    backbone = wide("llama")
    config = ClassificationConfig(sets=1, sentences=2, max_tokens=12, give_up=2, label_attempts=2)
    meter = Metered(LocalChat(backbone))
    with pytest.raises(BackendError, match="set_too_few_labels"):
        generate(config, meter, tmp_path / "toy.sqlite", judge=LikelihoodJudge(backbone))
    assert meter.usage.requests == 4 and meter.usage.completion_tokens > 0
