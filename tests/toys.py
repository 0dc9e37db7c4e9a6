"""Tiny models and tasks in code, and the plain functions the tests share. Fixtures are in conftest.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
WINDOW = 96
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]  # Qwen2's tokenizer adds the last one
PAD, BOS, EOS = 0, 1, 2
SENTENCES = [
    "The film is a joy from the first scene to the last, and the actors are wonderful.",
    "A dull and slow story; I left before the end and I want my two hours back.",
    "Review: the food was cold, the waiter was rude. Sentiment: negative",
    "Review: what a lovely evening with good music and kind people. Sentiment: positive",
    "Is the sentence above good or bad? Answer: good",
    "Question: which of these is a colour? red, seven, table. Answer: red",
    "Please decide whether the text below was written by a person or by a machine.",
    "In 1984 there were 42 of them, in 2024 there are 1,337. Numbers: 0 1 2 3 4 5 6 7 8 9",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if not (loop.last and continue_final_message|default(false)) %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


# --- tokenizers and models -------------------------------------------------------------------------------------------


def make_tokenizer(*, bos: bool = False, eos: bool = False, template: str | None = CHATML):
    """Byte-level BPE trained on :data:`SENTENCES`; ``bos`` / ``eos``: added around every text by default."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    if bos or eos:
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=None if eos else "<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def make_model(kind: str, vocab: int, *, tied: bool = False, seed: int = 0, window: int = WINDOW):
    """A random model of a few layers whose outputs are far from uniform."""
    import transformers as t

    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    small = {"vocab_size": vocab, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": window}
    small |= {"initializer_range": 0.3, "tie_word_embeddings": tied, **ids}
    gemma = small | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "final_logit_softcapping": 12.0}
    torch.manual_seed(seed)
    if kind == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**small))
    elif kind == "qwen2":
        model = t.Qwen2ForCausalLM(t.Qwen2Config(**small))
    elif kind == "gpt2":
        sizes = {"n_positions": window, "n_embd": 32, "n_layer": 3, "n_head": 4}
        model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=vocab, initializer_range=0.3, **sizes, **ids))
    elif kind == "gemma2":
        capped = {"attn_logit_softcapping": 20.0, "attn_implementation": "eager"}
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        model = t.Gemma2ForCausalLM(t.Gemma2Config(**gemma, layer_types=layers, **capped))
    elif kind == "gemma3":
        layers = ["sliding_attention", "sliding_attention", "full_attention"]
        model = t.Gemma3ForCausalLM(t.Gemma3TextConfig(**gemma, layer_types=layers))
    elif kind == "gemma3_vision":  # what AutoModelForCausalLM makes of the larger Gemma 3 models
        layers = ["sliding_attention", "sliding_attention", "full_attention"]
        eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        eyes |= {"image_size": 28, "patch_size": 14}
        config = t.Gemma3Config(
            text_config=gemma | {"layer_types": layers}, vision_config=eyes, image_token_index=PAD, mm_tokens_per_image=4
        )
        model = t.Gemma3ForConditionalGeneration(config)
    elif kind == "gpt_neo":
        sizes = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": window, "window_size": 16}
        layers = [[["global", "local"], 2]]
        model = t.GPTNeoForCausalLM(t.GPTNeoConfig(vocab_size=vocab, attention_types=layers, **sizes, **ids))
    elif kind == "mamba":
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}
        model = t.MambaForCausalLM(t.MambaConfig(vocab_size=vocab, **sizes, **ids))
    elif kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "n_positions": window}
        config = t.T5Config(vocab_size=vocab, decoder_start_token_id=PAD, eos_token_id=EOS, pad_token_id=PAD, **sizes)
        model = t.T5ForConditionalGeneration(config)
    else:
        raise ValueError(kind)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1:  # norms and biases
                p.add_(noise * 0.1)
            else:  # Gemma scales its input embeddings; tied ones would only repeat the last token
                p.copy_(noise * (0.1 if kind.startswith("gemma") and "embed" in name else 0.5))
    return model.eval()


@dataclass(frozen=True)
class Tiny:
    """One tiny model on disk, and how it differs from the others."""

    kind: str
    tied: bool = False
    bos: bool = False
    eos: bool = False
    extra_rows: int = 0
    seed: int = 0
    template: str | None = CHATML
    window: int = WINDOW


TINY = {
    "llama": Tiny("llama", bos=True),
    "llama_tied": Tiny("llama", tied=True, template=NO_SYSTEM),
    "llama_padded": Tiny("llama", tied=True, extra_rows=37),
    "gpt2": Tiny("gpt2", tied=True, template=None),
    "qwen2": Tiny("qwen2"),
    "gemma2": Tiny("gemma2", bos=True),
    "gemma3": Tiny("gemma3", bos=True),
    "gemma3_vision": Tiny("gemma3_vision", bos=True),
    "gpt_neo": Tiny("gpt_neo", tied=True),
    "mamba": Tiny("mamba"),
    "t5": Tiny("t5", eos=True),
}
CAUSAL = [name for name in TINY if name != "t5"]
KINDS = ["llama", "gpt2", "qwen2", "gemma2", "gemma3", "gpt_neo"]  # one of each causal architecture
WINDOWED = ["gemma2", "gemma3", "gemma3_vision", "gpt_neo"]  # some layers see the last 16 tokens only


def save_tiny(tiny: Tiny, folder: Path) -> str:
    if not (folder / "tokenizer.json").exists():
        tokenizer = make_tokenizer(bos=tiny.bos, eos=tiny.eos, template=tiny.template)
        model = make_model(tiny.kind, len(tokenizer) + tiny.extra_rows, tied=tiny.tied, seed=tiny.seed, window=tiny.window)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def exported(folder, name: str) -> str:
    """One prompt of a bank in a folder of its own."""
    from lm_eval_softverb.bank import Bank

    return str(Bank.load(folder).prompt(name).save(Path(folder) / name))


def hard_rows(backbone, ids):
    """Input embeddings [n, d] of real tokens: the rows of a soft prompt that must act like their text."""
    with torch.no_grad():
        return backbone.embedding(torch.tensor([ids]))[0].float()


# --- requests --------------------------------------------------------------------------------------------------------


def make_instances(kind: str, arguments, task: str = "toy", docs=None):
    """Harness requests from argument tuples; ``docs`` are their documents, one each."""
    from lm_eval.api.instance import Instance

    return [
        Instance(
            request_type=kind,
            doc={} if docs is None else docs[i],
            arguments=tuple(a) if isinstance(a, (tuple, list)) else (a,),
            idx=0,
            metadata=(task, i, 1),
        )
        for i, a in enumerate(arguments)
    ]


def loglikelihood(lm, pairs, **kw):
    return lm.loglikelihood(make_instances("loglikelihood", pairs, **kw), disable_tqdm=True)


def rolling(lm, texts, **kw):
    return lm.loglikelihood_rolling(make_instances("loglikelihood_rolling", texts, **kw), disable_tqdm=True)


def generate_until(lm, texts, settings=None, **kw):
    """Greedy by default, eight new tokens."""
    settings = {"until": [], "max_gen_toks": 8} | (settings or {})
    requests = make_instances("generate_until", [(t, dict(settings)) for t in texts], **kw)
    return lm.generate_until(requests, disable_tqdm=True)


def assert_same_scores(got, expected, tolerance: float = 1e-4):
    """Equal log-likelihoods, and equal greedy flags, pair by pair."""
    assert len(got) == len(expected)
    for i, ((a, a_greedy), (b, b_greedy)) in enumerate(zip(got, expected, strict=True)):
        assert abs(a - b) < tolerance, f"request {i}: {a} against {b}"
        assert a_greedy == b_greedy, f"request {i}"


# --- tasks -----------------------------------------------------------------------------------------------------------

CHOICE_ROWS = [
    {"text": text, "label": i % 2, "prompt_id": f"p{i % 2}"}
    for i, text in enumerate(["a joy", "a dull story", "good music", "cold food", "kind people", "two hours", "red", "the end"])
]
CHOICE_TASK = {
    "task": "toy_mc",
    "output_type": "multiple_choice",
    "doc_to_text": "Review: {{text}} Sentiment:",
    "doc_to_target": "{{label}}",
    "doc_to_choice": ["positive", "negative"],
    "metric_list": [{"metric": "acc"}],
    "rows": CHOICE_ROWS,
}
GENERATE_TASK = {
    "task": "toy_gen",
    "output_type": "generate_until",
    "doc_to_text": "Review: {{text}} Sentiment:",
    "doc_to_target": "{{['positive', 'negative'][label]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match"}],
    "rows": CHOICE_ROWS,
}


def logged(results, task):
    """The model's filtered answers of one task, in document order."""
    samples = sorted(results["samples"][task], key=lambda s: s["doc_id"])
    return [s["resps"] for s in samples]


def evaluate_arguments(results, task):
    """The contexts of one task as the harness rendered them, in document order."""
    samples = sorted(results["samples"][task], key=lambda s: s["doc_id"])
    return [s["arguments"][0][0] for s in samples]


# --- datasets of datasets ---------------------------------------------------------------------------------------------

WORDS = ["film", "day", "story", "evening", "waiter", "colour", "sentence", "number", "person", "machine"]


def rows_of(task: int, n: int = 14):
    """Rows of the ``task``-th of many small tasks of different lengths and sizes."""
    from lm_eval_softverb.data.rows import Row

    text = " ".join(WORDS[: 1 + task % 4])
    labels = (("good", "dull"), ("red", "table"), ("yes", "no"))[task % 3]
    return [Row(f"Sentence: {WORDS[(i * 7 + task) % 10]} {text} {i} Label:", labels[i % 2]) for i in range(n + task)]


class FakeDod:
    """A dataset of datasets in memory; even tasks are for training and have an instruction, odd ones have labels."""

    kind = "classification"
    sha256 = "fake"

    def __init__(self, n: int):
        self.n = n

    def reference(self):
        return {"kind": self.kind, "source": "fake", "settings": {}, "sha256": self.sha256}

    def names(self, split=None):
        return [f"task{t}" for t in range(self.n) if split in (None, ("train", "test")[t % 2])]

    def task(self, name):
        from lm_eval_softverb.data.dod import DodTask

        t = int(name[4:])
        rows = rows_of(t, 20)
        labels = tuple(dict.fromkeys(r.output for r in rows)) if t % 2 else ()
        return DodTask(name, ("train", "test")[t % 2], tuple(rows[6:]), tuple(rows[:6]), labels, "" if labels else "Say it.")
