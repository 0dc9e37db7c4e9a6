"""InSPEcT's fast grid against one layer pair at a time, and against a loop without any cache."""

from __future__ import annotations

import pytest
import torch
from toys import KINDS, hard_rows, make_tokenizer

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.residual import decoder_layers, states
from lm_eval_softverb.verbalizers.inspect_grid import Inspect, all_pairs
from lm_eval_softverb.verbalizers.patching import Patch, target_prefix, together


def prompts_of(backbone, *lengths):
    d = backbone.hidden_size
    return [SoftPrompt(torch.randn(n, d, generator=torch.Generator().manual_seed(n)) * 0.5) for n in lengths]


def grids(backbone, prompts, *, kind="labels", new=6, **settings):
    fast = Inspect(**settings).grid(backbone, prompts, kind=kind, max_new_tokens=new)
    slow = Inspect(**settings, mode="sequential").grid(backbone, prompts, kind=kind, max_new_tokens=new)
    return fast, slow


@pytest.fixture
def deep():
    """A random Llama of eight layers in float64."""
    import transformers as t

    tokenizer = make_tokenizer(bos=True)
    sizes = {"hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = t.LlamaConfig(
        vocab_size=len(tokenizer), intermediate_size=64, max_position_embeddings=256, initializer_range=0.3, **sizes
    )
    model = t.LlamaForCausalLM(config).double().eval().requires_grad_(False)
    return Backbone(model, tokenizer, "deep")


def test_every_pair_of_eight_layers_in_float64(deep):
    [fast], [slow] = grids(deep, prompts_of(deep, 4), new=12)
    assert list(fast) == all_pairs(8) and len(fast) == 64
    assert fast == slow
    assert len(set(fast.values())) > 30  # the pairs do differ


def test_the_pairs_equal_a_loop_that_runs_everything_again_for_each_token(deep):
    """As the published code does it, with hooks of its own: neither our cache nor our decoding."""
    [prompt] = prompts_of(deep, 4)
    verbalizer = Inspect()
    pairs = [(-1, -1), (-1, 3), (3, -1), (6, 6), (0, 5), (5, 0)]
    [fast] = verbalizer.grid(deep, [prompt], kind="labels", max_new_tokens=6, pairs=pairs)
    words = deep.tokenizer.encode(" | ".join(x.text for x in verbalizer.examples("labels")) + " |")
    filler = deep.tokenizer.encode(" x", add_special_tokens=False)[-1]
    hidden = deep.model(inputs_embeds=prompt.embeddings.double()[None], output_hidden_states=True).hidden_states
    layers = deep.model.model.layers
    for source, target in pairs:
        ids = [*words, *[filler] * 4]
        for _ in range(6):
            embeds = deep.model.get_input_embeddings()(torch.tensor([ids]))
            place = slice(len(words), len(words) + 4)
            if target == -1:
                embeds[:, place] = hidden[source + 1]
                logits = deep.model(inputs_embeds=embeds).logits
            else:

                def patch(_m, _i, out, place=place, source=source):
                    out = out.clone()
                    out[:, place] = hidden[source + 1]
                    return out

                handle = layers[target].register_forward_hook(patch)
                logits = deep.model(inputs_embeds=embeds).logits
                handle.remove()
            ids.append(int(logits[0, -1].argmax()))
        new = ids[len(words) + 4 :]
        end = new.index(2) if 2 in new else len(new)
        assert fast[source, target] == deep.tokenizer.decode(new[:end], skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", [*KINDS, "llama_padded"])
def test_every_architecture(backbone, name, tiny):
    """Windows of 16 tokens and float32 included; prompts of two lengths together."""
    model = Backbone.load(tiny(name, window=256), dtype="float64", device="cpu")
    fast, slow = grids(model, prompts_of(model, 3, 5), kind="instructions", new=8)
    assert fast == slow
    assert len({text for grid in fast for text in grid.values()}) > 5


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_chunks_change_nothing(deep, rows):
    [a], [b] = (Inspect(rows=r).grid(deep, prompts_of(deep, 3), kind="labels", max_new_tokens=4) for r in (rows, 0))
    assert a == b


def test_injection_after_the_first_layer(deep):
    [prompt] = prompts_of(deep, 3)
    fast, slow = grids(deep, [prompt], injection="layer0", new=5)
    assert fast == slow
    usual = Inspect().grid(deep, [prompt], kind="labels", max_new_tokens=5)[0]
    assert fast[0][0, 2] == usual[-1, 2]  # the prompt itself
    assert fast[0][3, 2] != usual[3, 2]
    [other] = Inspect(injection="layer0").grid(deep, [SoftPrompt(torch.ones(3, 32))], kind="labels", max_new_tokens=5)
    assert other[-1, 2] == fast[0][-1, 2]  # source layer -1 sees the placeholders only


def test_the_embeddings_of_words_patched_at_the_input_are_these_words(deep):
    ids = deep.tokenizer.encode(" good music and kind", add_special_tokens=False)
    prompt = SoftPrompt(hard_rows(deep, ids).float())
    [found] = Inspect().grid(deep, [prompt], kind="labels", max_new_tokens=8, pairs=[(-1, -1)])
    words = deep.tokenizer.encode(" | ".join(x.text for x in Inspect().examples("labels")) + " |")
    embeds = deep.model.get_input_embeddings()(torch.tensor([words + ids]))
    embeds[0, len(words) :] = prompt.embeddings.double()
    out = deep.model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
    assert found[-1, -1] == deep.tokenizer.decode(out, skip_special_tokens=True).strip()


def test_the_number_of_forward_passes(deep):
    """New tokens + 3 at most: the words, the soft prompt, the placeholders, and one less than there are new tokens."""
    count = 0

    def counting(_m, _a):
        nonlocal count
        count += 1

    handle = deep.model.model.layers[0].register_forward_pre_hook(counting)
    Inspect().grid(deep, prompts_of(deep, 4), kind="labels", max_new_tokens=10)
    handle.remove()
    assert 3 < count <= 10 + 3


def test_the_stream_is_what_transformers_shows(backbone):
    """``states`` against ``output_hidden_states``; GPT-2's position embeddings and Gemma's scale included."""
    for name in [*KINDS, "gemma3_vision"]:  # of the last, the language model's layers, not those that see
        model = backbone(name)
        embeds = prompts_of(model, 5)[0].embeddings[None]
        shown = model.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
        ours = states(model, embeds)
        assert len(ours) == len(decoder_layers(model)) == len(shown) - 1
        for mine, theirs in zip(ours, shown[:-1], strict=True):
            torch.testing.assert_close(mine, theirs)


def test_log_probabilities(deep):
    """Against a teacher-forced pass over one continuation, at the patch that needs no hook."""
    [prompt] = prompts_of(deep, 4)
    words = deep.tokenizer.encode("The film is")
    prefix = target_prefix(deep, words)
    streams = states(deep, prompt.embeddings.double()[None])
    placeholders = deep.model.get_input_embeddings()(torch.tensor([1, 1, 1, 1]))
    patches = [Patch(0, s, -1) for s in (-1, 0, 4)]
    found = together(deep, streams, patches, prefix, placeholders, max_new_tokens=7, score=True)
    table = deep.model.get_input_embeddings()
    for patch, answer in zip(patches, found, strict=True):
        new = [*answer.ids, *([2] if answer.stopped else [])]
        embeds = torch.cat([table(torch.tensor(words)), streams[patch.source + 1, 0], table(torch.tensor(new))])
        logits = deep.model(inputs_embeds=embeds[None]).logits[0].log_softmax(-1)
        expected = sum(logits[len(words) + 4 + i - 1, token] for i, token in enumerate(new))
        assert answer.log_probability == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("name", ["mamba", "t5"])
def test_models_without_keys_or_layers_to_patch_are_refused(backbone, name):
    model = backbone(name)
    with pytest.raises(ConfigError, match=r"keys and values|residual stream"):
        Inspect(source_layer=0, target_layer=0).verbalize(model, prompts_of(model, 3), kind="labels", max_new_tokens=4)
