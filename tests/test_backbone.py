"""The frozen model: embedding, shared prefixes, the head at chosen positions, and its fingerprint."""

from __future__ import annotations

import pytest
import torch
from toys import CAUSAL, TINY, WINDOWED, make_model, make_tokenizer

from lm_eval_softverb.backbone import Backbone, Prefix
from lm_eval_softverb.errors import ModelUnavailable
from lm_eval_softverb.prompt import SoftPrompt


def load(folder, dtype="float32"):
    return Backbone.load(folder, dtype=dtype, device="cpu")


def none(b):
    return torch.zeros(0, b.hidden_size)


def test_a_loaded_model_is_frozen_and_in_evaluation_mode(tiny):
    b = load(tiny("llama"))
    assert not b.model.training
    assert not any(p.requires_grad for p in b.model.parameters())
    assert (b.hidden_size, b.vocab_size, b.is_seq2seq) == (32, len(b.tokenizer), False)
    assert (b.dtype, b.device.type, b.name) == (torch.float32, "cpu", tiny("llama"))


def test_facts_of_an_encoder_decoder(backbone):
    assert backbone("t5").is_seq2seq


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_dtypes(tiny, dtype):
    assert load(tiny("llama"), dtype).dtype == (torch.float32 if dtype == "auto" else getattr(torch, dtype))


def test_a_missing_model_is_an_error_with_the_remedy(tmp_path):
    with pytest.raises(ModelUnavailable, match=r"hf download nobody/nothing.*smollm2-135m"):
        load("nobody/nothing")
    with pytest.raises(ModelUnavailable):
        load(str(tmp_path))


# --- embedding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_virtual_ids_take_their_rows_and_real_ids_their_embeddings(name, backbone):
    b = backbone(name)
    rows = torch.randn(5, 32)
    ids = torch.tensor([[-1, 7, -5, 3], [4, -3, -3, 0]])
    out = b.embed(ids, rows)
    assert torch.equal(out[0, 0], rows[0])
    assert torch.equal(out[0, 2], rows[4])
    assert torch.equal(out[1, 1], out[1, 2])
    real = b.embedding(ids.clamp(min=0))
    assert torch.equal(out[ids >= 0], real[ids >= 0])
    assert torch.equal(b.embed(ids.abs(), none(b)), b.embedding(ids.abs()))


def test_gradients_reach_the_rows_and_nothing_else(backbone):
    b = backbone("llama")
    rows = torch.randn(2, 32, requires_grad=True)
    keep = torch.tensor([[False, False, True]])
    b.logits(b.embed(torch.tensor([[-1, -2, 5]]), rows), keep).sum().backward()
    assert rows.grad is not None
    assert rows.grad.abs().sum() > 0
    assert all(p.grad is None for p in b.model.parameters())


def test_stack_puts_prompts_one_after_the_other(backbone):
    b = backbone("llama")
    a, c = (SoftPrompt(torch.randn(n, 32)) for n in (2, 3))
    assert torch.equal(b.stack([a, c]), torch.cat([a.embeddings, c.embeddings]))
    assert list(b.stack([]).shape) == [0, 32]


def test_tensor_pads_to_the_longest(backbone):
    b = backbone("llama")
    assert b.tensor([[1, 2], [3]]).tolist() == [[1, 2], [3, 0]]
    assert b.tensor([[1, 2], [3]], left=True, pad=9).tolist() == [[1, 2], [9, 3]]


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_logits_at_chosen_positions_are_those_of_the_whole_forward(name, backbone):
    b = backbone(name)
    ids = torch.randint(3, b.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    keep = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.4
    got = b.logits(b.embed(ids, none(b)), keep)
    assert torch.allclose(got, b.model(ids).logits[keep], atol=1e-4)
    assert b.model(ids).logits.shape == (3, 9, b.vocab_size)  # the head is as it was


@torch.no_grad()
def test_seq2seq_logits_at_chosen_positions(backbone):
    b = backbone("t5")
    ids, decoder = torch.randint(3, 300, (2, 6)), torch.randint(3, 300, (2, 4))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    keep = torch.tensor([[True, False, True, True], [False, True, False, False]])
    got = b.seq2seq_logits(b.embed(ids, none(b)), mask, decoder, keep)
    expected = b.model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits[keep]
    assert torch.allclose(got, expected, atol=1e-4)


def test_the_head_is_restored_after_an_error(backbone):
    b = backbone("llama")
    with pytest.raises(RuntimeError):
        b.logits(torch.zeros(1, 3, 7), torch.ones(1, 3, dtype=torch.bool))
    with torch.no_grad():
        assert b.model(torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, b.vocab_size)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "mamba"])
@torch.no_grad()
def test_rows_behind_a_shared_prefix_equal_whole_rows(name, backbone):
    b = backbone(name)
    rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) * 0.5
    head, tails = [-1, -2, -3, -4, 9, 8], [[10, 11, 12], [20, 21, 22]]
    prefix = b.prefix(head, rows)
    assert prefix is not None
    assert prefix.length == 6
    before = [k.clone() for k, _ in prefix.layers]
    ids = torch.tensor(tails)
    keep = torch.ones_like(ids, dtype=torch.bool)
    for _ in range(2):  # a prefix is used many times
        got = b.logits(b.embed(ids, rows), keep, cache=prefix.expand(2, b.model.config))
        whole = b.embed(torch.tensor([head + t for t in tails]), rows)
        assert torch.allclose(got, b.model(inputs_embeds=whole).logits[:, 6:].flatten(0, 1), atol=1e-4)
    assert all(torch.equal(k, old) for (k, _), old in zip(prefix.layers, before, strict=True))


def test_no_prefix_where_it_could_not_be_right(backbone):
    llama, gemma = backbone("llama"), backbone("gemma3")
    with torch.no_grad():
        assert llama.prefix([], none(llama)) is None
        assert backbone("t5").prefix([3, 4], none(llama)) is None
        assert backbone("mamba").prefix([3, 4], none(llama)) is None
        assert gemma.prefix(list(range(3, 18)), none(gemma)) is not None  # 15 tokens, the window is 16
        assert gemma.prefix(list(range(3, 19)), none(gemma)) is None


def test_gaps_are_harmless_only_where_every_token_sees_all(backbone):
    assert {name for name in CAUSAL if not backbone(name).gaps_are_harmless} == {*WINDOWED, "mamba"}


# --- fingerprint -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_fingerprint_is_the_same_for_every_dtype(name, tiny, tmp_path):
    exact = load(tiny(name)).fingerprint
    for dtype in ("bfloat16", "float16"):
        other = load(tiny(name), dtype).fingerprint
        assert exact.differences(other) == []
        assert other.differences(exact) == []
    b = load(tiny(name), "bfloat16")
    b.model.save_pretrained(tmp_path / "half")
    b.tokenizer.save_pretrained(tmp_path / "half")
    again = load(str(tmp_path / "half")).fingerprint
    assert exact.differences(again) == []


def test_fingerprint_tells_another_model_of_the_same_shape(tiny):
    ours, other = load(tiny("llama")).fingerprint, load(tiny("llama", seed=7)).fingerprint
    (difference,) = ours.differences(other)
    assert difference.startswith("weights:")


def fingerprint_of(model, tokenizer=None):
    return Backbone(model.eval(), tokenizer or make_tokenizer(bos=True)).fingerprint


@pytest.mark.parametrize(
    "part", ["embed_tokens", "layers.1.self_attn.k_proj", "layers.2.mlp.down_proj", "layers.0.input_layernorm", "lm_head"]
)
def test_fingerprint_tells_one_changed_matrix(part):
    vocabulary = len(make_tokenizer())
    before, model = fingerprint_of(make_model("llama", vocabulary)), make_model("llama", vocabulary)
    assert before.differences(fingerprint_of(model)) == []
    ((name, parameter),) = [(n, p) for n, p in model.named_parameters() if part in n]
    with torch.no_grad():
        parameter.mul_(1.05)
    (difference,) = before.differences(fingerprint_of(model))
    assert "1 of" in difference or "embed" in name


def test_fingerprint_tells_a_copy_in_few_bits(tiny):
    """Weights rounded as a 4-bit file rounds them are another model."""
    ours = load(tiny("llama")).fingerprint
    b = load(tiny("llama"))
    with torch.no_grad():
        for p in b.model.parameters():
            if p.dim() == 2:
                scale = p.abs().amax(1, keepdim=True) / 7
                p.copy_((p / scale).round() * scale)
    assert ours.differences(Backbone(b.model, b.tokenizer).fingerprint)


@pytest.mark.parametrize("change", ["vocabulary", "merges", "digits", "end"])
def test_fingerprint_tells_another_tokenizer(change):
    from tokenizers import pre_tokenizers

    model = make_model("llama", len(make_tokenizer()))
    before, tokenizer = fingerprint_of(model), make_tokenizer(bos=True)
    assert before.differences(fingerprint_of(model, tokenizer)) == []
    if change == "vocabulary":
        tokenizer.add_tokens(["softverb"])
    elif change == "merges":
        import json

        from tokenizers import Tokenizer

        data = json.loads(tokenizer.backend_tokenizer.to_str())
        data["model"]["merges"] = data["model"]["merges"][:10]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))
    elif change == "digits":
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        tokenizer.backend_tokenizer.pre_tokenizer = split
        if tokenizer.encode(" 1984") == make_tokenizer(bos=True).encode(" 1984"):
            pytest.skip("the tiny vocabulary has no token of several digits")
    else:
        tokenizer.eos_token = "<|im_end|>"
    (difference,) = before.differences(fingerprint_of(model, tokenizer))
    assert difference.startswith("tokenizer:")


def test_fingerprint_does_not_depend_on_the_name_or_folder(tiny, tmp_path):
    b = load(tiny("gpt2"))
    b.model.save_pretrained(tmp_path / "copy")
    b.tokenizer.save_pretrained(tmp_path / "copy")
    copy = load(str(tmp_path / "copy")).fingerprint
    assert copy.name != b.fingerprint.name
    assert b.fingerprint.differences(copy) == []
    assert copy.tokenizer_sha256 == b.fingerprint.tokenizer_sha256


@pytest.mark.parametrize("counts", [[16], [16, 16, 16], [16, 3, 9]])
def test_gradients_of_a_repeated_prefix_are_rounded_once(backbone, counts):
    """In bfloat16, adding up sixteen rows one by one loses what sums in float32 keep."""
    model = backbone("llama")
    generator = torch.Generator().manual_seed(0)
    layers = model.text_config.num_hidden_layers
    keys = torch.randn(len(counts), 2, 3, 4, generator=generator).bfloat16().requires_grad_()
    prefix = Prefix(((keys, keys.detach()),) * layers, 3)
    rows = prefix.repeat(counts, model.model.config).layers[0].keys
    weights = (torch.rand(rows.shape, generator=generator) + 0.5).bfloat16()
    (rows * weights).sum().backward()
    expected = torch.stack([part.float().sum(0) for part in weights.split(counts)]).bfloat16()
    assert torch.equal(rows[0], keys[0]) and torch.equal(rows[-1], keys[-1])
    assert torch.equal(keys.grad, expected)


def test_gradients_of_virtual_tokens_in_many_rows_add_up_in_float32(tiny):
    """A slot behind the text of a row is embedded once per row."""
    model = Backbone.load(tiny("llama"), dtype="bfloat16", device="cpu")
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    embeds = model.embed(torch.tensor([[5, -1, -2]] * 40), rows)
    weights = (torch.rand(embeds.shape, generator=torch.Generator().manual_seed(1)) + 0.5).bfloat16()
    (embeds * weights).float().sum().backward()
    torch.testing.assert_close(rows.grad, weights[:, 1:].float().sum(0), rtol=1e-5, atol=1e-5)
