"""``softverb verbalize``: texts of many soft prompts in one JSONL file, batch by batch, so that a kill loses one batch.

Each line holds ``prompt_id``, ``text``, ``rank`` (0 is the method's answer), ``kind``, ``confidence``, ``details``,
``settings`` and ``run``, which identifies everything that decided the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import lm_eval_softverb
from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.batching import Counters, halving
from lm_eval_softverb.errors import ArtifactError
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers import MAX_NEW_TOKENS, Kind
from lm_eval_softverb.verbalizers.base import Verbalization, Verbalizer, controlled, settings_of


def kind_of(entry: Mapping[str, Any]) -> Kind:
    """What a manifest entry's prompt should be asked for: its label set where it has one."""
    return "labels" if entry.get("labels") else "instructions"


def verbalize_to(
    out: Path,
    verbalizer: Verbalizer,
    backbone: Backbone,
    prompts: Sequence[SoftPrompt],
    entries: Sequence[Mapping[str, Any]],
    *,
    kind: Kind | None = None,
    max_new_tokens: int | None = None,
    control: str = "none",
    control_seed: int = 0,
    batch_size: int = 16,
    overwrite: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Writes all texts of ``prompts`` to ``out``; called again after a kill, it goes on behind the last finished batch.

    Args:
        entries: of the bank's manifest, one per prompt, with at least ``prompt_id``.
        kind: what to ask for; by default what each entry has ground truth for.
        control: see :func:`~lm_eval_softverb.verbalizers.base.controlled`.

    Returns:
        All lines of the file, in the order of ``prompts``.

    Raises:
        ArtifactError: ``out`` holds texts of another run and ``overwrite`` is false.
    """
    storage.require_writable(out.parent)
    settings = {**settings_of(verbalizer), "control": control, "control_seed": control_seed if control != "none" else None}
    base = [sorted(backbone.fingerprint.sketch.items()), backbone.fingerprint.tokenizer_sha256, str(backbone.dtype)]
    read = controlled(prompts, control, control_seed)
    asked = [(kind or kind_of(e), max_new_tokens or MAX_NEW_TOKENS[kind or kind_of(e)]) for e in entries]
    runs = [
        storage.sha256_json([lm_eval_softverb.__version__, settings, base, prompt.id, *ask])[:16]
        for prompt, ask in zip(prompts, asked, strict=True)
    ]
    names = [str(e["prompt_id"]) for e in entries]
    lines = {} if overwrite or not out.exists() else _found(out, dict(zip(names, runs, strict=True)))
    counters = Counters()

    def save() -> None:
        storage.write_jsonl(out, (line for name in names for line in lines.get(name, ())))

    with tqdm(total=len(prompts), initial=len(lines), desc=f"{verbalizer.method}: prompts", disable=not progress) as bar:
        for ask in dict.fromkeys(asked):
            missing = [i for i, name in enumerate(names) if name not in lines and asked[i] == ask]

            def run(part: Sequence[int], ask: tuple[Kind, int] = ask) -> list[tuple[int, list[Verbalization]]]:
                some = [read[i] for i in part]
                texts = verbalizer.verbalize(backbone, some, kind=ask[0], max_new_tokens=ask[1])
                return list(zip(part, texts, strict=True))

            for start in range(0, len(missing), batch_size):
                for i, texts in halving(run, missing[start : start + batch_size], counters):
                    shared = {"kind": ask[0], "max_new_tokens": ask[1], "base_model": backbone.name, "settings": settings}
                    lines[names[i]] = [
                        {"prompt_id": names[i], "rank": rank, **text.to_json(), **shared, "run": runs[i]}
                        for rank, text in enumerate(texts)
                    ]
                    bar.update()
                save()
    save()
    return [line for name in names for line in lines[name]]


def _found(out: Path, runs: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    lines: dict[str, list[dict[str, Any]]] = {}
    for number, line in storage.read_jsonl(out):
        name = line.get("prompt_id")
        if runs.get(str(name)) != line.get("run"):
            raise ArtifactError(
                f"{out}:{number} holds a text of prompt {name!r} from another run (other prompts, settings or base model). "
                "Choose another --out, or pass --overwrite."
            )
        lines.setdefault(str(name), []).append(line)
    return lines
