"""The decoding loop: finished rows leave late and change nothing, scores are sums, the fast argmax is argmax."""

from __future__ import annotations

import pytest
import torch

from lm_eval_softverb import decoding
from lm_eval_softverb.decoding import Sampling, generate


@pytest.mark.parametrize("shape", [(3, 256), (5, 130), (2, 384)])
def test_argmax_is_argmax_and_the_first_of_equals_wins(shape):
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(20):
            logits = torch.randint(0, 9, shape, generator=generator).to(dtype)  # many ties
            assert torch.equal(decoding._argmax(logits), torch.tensor([row.index(max(row)) for row in logits.tolist()]))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(do_sample=True, temperature=0.7), Sampling(repetition_penalty=1.3)])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rows_that_end_at_different_steps(backbone, name, sampling, monkeypatch):
    """Against each row alone, whenever finished rows leave the cache."""
    model = backbone(name)
    contexts = [model.tokenizer.encode(t) for t in ("Good.", "The film is", "A dull and slow story", "red", "Is it 42?")]

    def texts(*places):
        return generate(
            model,
            torch.zeros(0, 32),
            [contexts[i] for i in places],
            max_new_tokens=20,
            finished=lambda ids: ids[-1] % 5 == 0,
            sampling=sampling,
            seeds=list(places),
        )

    alone = [texts(i)[0] for i in range(len(contexts))]
    assert len({len(a) for a in alone}) > 2
    for keep in (1.0, 0.75, 0.0):
        monkeypatch.setattr(decoding, "KEEP", keep)
        assert texts(*range(len(contexts))) == alone


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_contexts_that_rows_share_are_read_once(backbone, name, monkeypatch):
    """Many samples of one context: each is what it is alone."""
    model, read = backbone(name), []
    contexts = [model.tokenizer.encode(t) for t in ("Good.", "The film is")]
    real = decoding._prefill
    monkeypatch.setattr(decoding, "_prefill", lambda *a: (read.append(len(a[3])), real(*a))[1])
    settings = {"max_new_tokens": 6, "finished": lambda _ids: False, "sampling": Sampling(do_sample=True)}

    def texts(rows):
        return generate(model, torch.zeros(0, 32), [contexts[c] for c, _ in rows], seeds=[s for _, s in rows], **settings)

    rows = [(0, 1), (1, 1), (0, 2), (0, 3), (1, 2)]
    together = texts(rows)
    assert read == [2]
    assert together == [texts([row])[0] for row in rows] and len({tuple(t) for t in together}) == len(rows)
