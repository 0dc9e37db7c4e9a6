"""Every arm of a bank's test tasks: what is scored, on what, and where it lies.

On the small model: the soft prompts, no prompt, the ground truth, another task's, examples, and each reading. On a chat model
behind an endpoint: all of these but the soft prompts. Without a model: the most frequent output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from lm_eval_softverb.bank import Bank
from lm_eval_softverb.compare import fillings
from lm_eval_softverb.compare.arms import Arm
from lm_eval_softverb.compare.readings import Reading, only
from lm_eval_softverb.data.dod import documents
from lm_eval_softverb.data.verbalization import truths, with_truth
from lm_eval_softverb.errors import ConfigError, DataError
from lm_eval_softverb.metrics import dod as tasks
from lm_eval_softverb.verbalizers import Kind

TASKS = {"dod_general": "general", "dod_classification": "classification", "dod_classification_mc": "classification"}
"""Harness task → kind of DoD; the first of a kind is its default. Endpoints and recorded outputs have no log-likelihoods."""
CHAT = "chat-"
"""Begins the names of arms on the endpoint."""


@dataclass(frozen=True)
class Endpoint:
    """A chat model to score the texts on.

    Attributes:
        model: as the endpoint calls it.
        base_url: None is OpenAI's.
        prices, max_dollars: of all arms together.
        settings: further arguments of ``--model hardprompt-chat``.
    """

    model: str
    base_url: str | None = None
    prices: Path | None = None
    max_dollars: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_args(self) -> dict[str, Any]:
        return {"model": self.model, **({"base_url": self.base_url} if self.base_url else {}), **self.settings}

    @property
    def limits(self) -> dict[str, Any]:
        given = {"prices": self.prices and str(self.prices), "max_dollars": self.max_dollars}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class BankArms:
    """What is scored, on what, and where the results go.

    Attributes:
        bank: folder of the soft prompts.
        out: folder of everything that is written.
        task: one of :data:`TASKS`; None: by the kind of the bank's DoD.
        rows: held-out rows per DoD task.
        tasks_most: DoD tasks at most, evenly from all of them.
        shots: examples in the few-shot arm.
        seed: of the examples and of who gets whose text.
        dod: where the bank's DoD is on this machine, if its manifest names another place.
        baseline: name of an arm; None: the ground truth, on the endpoint if there is one.
        overwrite: discard readings of other settings.
    """

    bank: Path
    out: Path
    task: str | None = None
    readings: tuple[Reading, ...] = ()
    endpoint: Endpoint | None = None
    pretrained: str = "smollm2-135m"
    dtype: str = "auto"
    device: str | None = None
    batch_size: int = 16
    rows: int = 30
    tasks_most: int | None = None
    shots: int = 5
    seed: int = 0
    dod: str | None = None
    baseline: str | None = None
    overwrite: bool = False
    progress: bool = True

    # --- what is scored ----------------------------------------------------------------------------------------------

    @cached_property
    def whole(self) -> Bank:
        return with_truth(Bank.load(self.bank), self.dod)

    @cached_property
    def scored(self) -> str:
        """The harness's task."""
        if self.task is not None:
            return self.task
        kinds = {str((e.get("dod") or {}).get("kind")) for e in self.whole.entries}
        found = [task for task, kind in TASKS.items() if kind in kinds and not task.endswith("_mc")]
        if len(found) != 1:
            raise ConfigError(
                f"Bank {self.bank} has prompts of these kinds of DoD: {', '.join(sorted(kinds))}. Pass --task "
                f"{' or '.join(found or TASKS)}; `softverb bank` writes banks that have a DoD."
            )
        return found[0]

    @property
    def generates(self) -> bool:
        return not self.scored.endswith("_mc")

    @cached_property
    def scope(self) -> Bank:
        """The prompts that are scored."""
        kind = cast(documents.Kind, TASKS[self.scored])
        return only(self.whole, set(documents.prompts_of(kind, self.bank, None, self.tasks_most, self.dod)))

    @cached_property
    def documents(self) -> int:
        """How many; each is one request of each arm."""
        load = tasks.general if self.scored == "dod_general" else tasks.classification
        return len(load(**self.metadata)["test"])

    @property
    def split(self) -> str | None:
        """Of the prompts that are scored, if it is one."""
        splits = {e.get("split") for e in self.scope.entries}
        return str(splits.pop()) if len(splits) == 1 and None not in splits else None

    @property
    def metadata(self) -> dict[str, Any]:
        """What the harness's task is told."""
        given = {"bank": str(self.bank), "rows": self.rows, "tasks_most": self.tasks_most, "dod": self.dod}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def kind(self) -> Kind:
        """What a reading is asked for."""
        return "instructions" if self.scored == "dod_general" else "labels"

    # --- arms --------------------------------------------------------------------------------------------------------

    @cached_property
    def others(self) -> list[fillings.Line]:
        """Each prompt's text of another task of its split; none where there is no other text to take."""
        splits, scored = ({e.get(key) for e in self.scope.entries} for key in ("split", "prompt_id"))
        around = only(self.whole, {str(e["prompt_id"]) for e in self.whole.entries if e.get("split") in splits})
        truths(around, self.dod)  # what is missing altogether is an error
        try:
            return [line for line in fillings.other(around, self.seed, self.dod) if line["prompt_id"] in scored]
        except DataError:
            return []

    @property
    def texts(self) -> list[str]:
        """Names of the texts, in the order of the arms."""
        return ["gold", *(["other"] if self.others else []), f"shots{self.shots}", *(r.name for r in self.readings)]

    def text(self, name: str) -> Path:
        """File of one of the texts."""
        return self.out / "texts" / f"{name}.jsonl"

    def folder(self, name: str) -> Path:
        """Of one arm's run."""
        return self.out / "runs" / name

    @property
    def cache(self) -> Path:
        """Answers of all arms."""
        return self.out / "cache" / "answers"

    @property
    def arms(self) -> list[Arm]:
        local = {"pretrained": self.pretrained, "dtype": self.dtype}
        found = [self._arm("softprompt", "softprompt", {**local, "bank": str(self.bank)}, self.device)]
        found.append(self._arm("none", "hardprompt", local, self.device))
        for name in self.texts:
            found.append(self._arm(name, "hardprompt", {**local, "prompt_file": str(self.text(name))}, self.device))
        if self.endpoint:
            for name in ("none", *self.texts):
                own = {} if name == "none" else {"prompt_file": str(self.text(name))}
                arm = self._arm(CHAT + name, "hardprompt-chat", {**self.endpoint.model_args, **own})
                found.append(replace(arm, limits=self.endpoint.limits))
        if self.generates:
            found.append(self._arm("majority", "replay", {"file": str(self.text("majority"))}))
        return found

    def _arm(self, name: str, model: str, model_args: Mapping[str, Any], device: str | None = None) -> Arm:
        return Arm(
            name,
            model,
            model_args,
            (self.scored,),
            metadata=self.metadata,
            batch_size=self.batch_size,
            device=device,
        )

    @property
    def base(self) -> str:
        """Name of the arm that all others are compared with."""
        return self.baseline or (f"{CHAT}gold" if self.endpoint else "gold")
