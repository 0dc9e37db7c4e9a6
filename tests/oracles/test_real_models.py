"""The same oracles on trained models: the packaged default, and a model of 260 thousand parameters where it is at hand."""

from __future__ import annotations

import pytest
from lm_eval.models.huggingface import HFLM
from toys import SHARED, assert_same_scores, generate_until, hard_rows, loglikelihood, rolling

from lm_eval_softverb.models.softprompt import SoftPromptLM
from lm_eval_softverb.pretrained import DEFAULT, locate

HARD = "Once upon a time there was a little dog"
TEXTS = [" who liked to play.", " and a cat. They", ". One day, the dog went to the park and saw a big", " and"]
CHOICES = [" ball", " tree in the garden", " tree"]


@pytest.fixture(scope="module")
def stories():
    folder = SHARED / "data" / "stories260k"
    if not folder.is_dir():
        pytest.skip("the folder shared/data/stories260k is not beside this repository")
    return str(folder)


@pytest.fixture(scope="module")
def smollm():
    return locate(DEFAULT)


def models(folder, save_prompt, placement):
    """The stock model, ours without a prompt, and ours with a prompt of real tokens."""
    arguments = {"device": "cpu", "dtype": "float32"}
    stock = HFLM(pretrained=folder, batch_size=1, **arguments)
    plain = SoftPromptLM(pretrained=stock.model, tokenizer=stock.tokenizer, batch_size=4)
    hard = plain.tok_encode(HARD, add_special_tokens=False)
    prompt = save_prompt(hard_rows(plain.backbone, hard), placement)
    return stock, plain, SoftPromptLM(pretrained=stock.model, tokenizer=stock.tokenizer, peft=prompt, batch_size=4)


def test_stories260k(stories, save_prompt):
    """This tokenizer adds a BOS and a blank before every text: the words stand behind both."""
    stock, plain, lm = models(stories, save_prompt, "after_bos")
    texts = [t.removeprefix(" ") for t in TEXTS if t.startswith(" ")]
    words, in_front = ([(f"{head}{t}", c) for t in texts for c in CHOICES] for head in ("", HARD + " "))
    assert_same_scores(loglikelihood(plain, words), loglikelihood(stock, words), 1e-3)
    assert_same_scores(loglikelihood(lm, words), loglikelihood(stock, in_front), 1e-3)
    assert generate_until(plain, texts) == generate_until(stock, texts)
    assert generate_until(lm, texts) == generate_until(stock, [f"{HARD} {t}" for t in texts])
    assert rolling(plain, texts) == pytest.approx(rolling(stock, texts), abs=1e-2)


@pytest.mark.real_model
def test_the_packaged_default(smollm, save_prompt):
    stock, _, lm = models(smollm, save_prompt, "prefix")
    words = [(t, c) for t in TEXTS[:2] for c in CHOICES]
    assert_same_scores(loglikelihood(lm, words), loglikelihood(stock, [(HARD + t, c) for t, c in words]), 1e-3)
    texts = generate_until(lm, TEXTS[:2])
    assert texts == generate_until(stock, [HARD + t for t in TEXTS[:2]])
    assert texts[0] != texts[1]


@pytest.mark.real_model
def test_a_frame_in_the_chat_of_the_packaged_default(smollm, save_prompt):
    """The words of a frame and of the prompt in its slot, in the model's own chat template."""
    arguments = {"device": "cpu", "dtype": "float32"}
    stock = HFLM(pretrained=smollm, batch_size=1, **arguments)
    words = "Name the colour of the thing"
    ids = stock.tok_encode(words, add_special_tokens=False)
    plain = SoftPromptLM(pretrained=stock.model, tokenizer=stock.tokenizer)
    prompt = save_prompt(hard_rows(plain.backbone, ids), "user_start", "(§).")
    lm = SoftPromptLM(pretrained=stock.model, tokenizer=stock.tokenizer, peft=prompt, batch_size=4)
    questions = ["grass", "the sky on a clear day"]
    chats = [lm.apply_chat_template([{"role": "user", "content": q}]) for q in questions]
    said = [stock.apply_chat_template([{"role": "user", "content": f"({words}). {q}"}]) for q in questions]
    assert generate_until(lm, chats, {"max_gen_toks": 12}) == generate_until(stock, said, {"max_gen_toks": 12})
