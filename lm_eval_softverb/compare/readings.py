"""Readings: texts that a method writes from a bank's prompts, or that lie in a file of ``softverb verbalize``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_softverb import storage
from lm_eval_softverb.bank import Bank
from lm_eval_softverb.errors import ConfigError, DataError, did_you_mean
from lm_eval_softverb.models.hardprompts import HardPrompts
from lm_eval_softverb.verbalizers import CONTROLS, Kind

if TYPE_CHECKING:
    from lm_eval_softverb.backbone import Backbone
    from lm_eval_softverb.verbalizers.base import Verbalizer

COMMON = ("control", "control_seed", "max_new_tokens")
"""Settings of any method: arguments of ``softverb verbalize`` of the same names."""


@dataclass(frozen=True)
class Reading:
    """One way to come by a text per prompt.

    Attributes:
        name: of the arm and of its file.
        method, settings: of a verbalizer; the settings may include :data:`COMMON`.
        file: texts that are there already, instead of a method.
    """

    name: str
    method: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None

    def check(self, bank: Bank) -> None:
        """Finds out what can be wrong before anything is computed.

        Raises:
            ConfigError: an unknown method or setting, or a value of the wrong type.
            DataError: a file that cannot be read, or lacks the text of a prompt of ``bank``.
            ArtifactError: a method's adapter or bridge that is not there.
        """
        if self.file is None:
            self.verbalizer(bank)
            self._common()
            return
        texts = HardPrompts.read(str(self.file)).texts
        if not texts:
            raise ConfigError(f"--reading {self.name}={self.file}: expected a .jsonl as `softverb verbalize` writes it.")
        missing = [n for e in bank.entries if (n := str(e["prompt_id"])) not in texts]
        if missing:
            raise DataError(
                f"{self.file} has no text for {len(missing)} of the {len(bank.entries)} prompts to score, for example "
                f"{missing[0]!r}. {did_you_mean(missing[0], list(texts))} Read them with `softverb verbalize`."
            )

    def verbalizer(self, bank: Bank) -> Verbalizer:
        """The method, which must not see the ground truth of ``bank`` in its examples."""
        from lm_eval_softverb.verbalizers.base import create, for_bank

        own = {name: value for name, value in self.settings.items() if name not in COMMON}
        return for_bank(create(self.method, **own), bank.entries)

    def write(
        self,
        out: Path,
        whole: Bank,
        scope: Bank,
        kind: Kind,
        backbone: Backbone | None,
        *,
        batch_size: int = 16,
        overwrite: bool = False,
        progress: bool = True,
    ) -> None:
        """Writes the texts of ``scope`` to ``out``; what is there of the same method is kept.

        Args:
            whole: the bank, whose ground truth no example may show.
            scope: the prompts that are scored.
            backbone: the prompts' model; None for a file.

        Raises:
            ArtifactError: ``out`` holds texts of other settings and ``overwrite`` is false.
            BaseModelMismatch: the prompts are of another model.
        """
        wanted = {str(e["prompt_id"]) for e in scope.entries}
        if self.file is not None:
            if not out.exists() or not out.samefile(self.file):
                lines = [line for _, line in storage.read_jsonl(self.file) if line.get("rank", 0) == 0]
                storage.write_jsonl(out, [line for line in lines if line.get("prompt_id") in wanted])
            return
        from lm_eval_softverb.verbalizers.base import check_fits
        from lm_eval_softverb.verbalizers.texts import verbalize_to

        assert backbone is not None
        if out.exists():  # a smaller choice of prompts discards no texts
            wanted |= {str(line.get("prompt_id")) for _, line in storage.read_jsonl(out)}
        read = only(whole, wanted)
        verbalizer = self.verbalizer(whole)
        check_fits(verbalizer, read.prompts, backbone.fingerprint)
        verbalize_to(
            out,
            verbalizer,
            backbone,
            read.prompts,
            read.entries,
            kind=kind,
            batch_size=batch_size,
            overwrite=overwrite,
            progress=progress,
            **self._common(),
        )

    def command(self, out: Path, bank: Path, kind: Kind, split: str | None, model: list[str]) -> list[str]:
        """The same texts by a command of their own."""
        if self.file is not None:
            return ["cp", str(self.file), str(out)]
        words = ["softverb", "verbalize", "--method", self.method, "--bank", str(bank), "--out", str(out), "--kind", kind]
        words += ["--split", split] if split else []
        for name, value in self.settings.items():
            words += [f"--{name.replace('_', '-')}", value] if name in COMMON else ["--set", f"{name}={value}"]
        return [*words, *model]

    def _common(self) -> dict[str, Any]:
        found: dict[str, Any] = {name: self.settings[name] for name in COMMON if name in self.settings}
        if found.get("control", "none") not in CONTROLS:
            raise ConfigError(f"Reading {self.name}: control is {found['control']!r}, expected {' or '.join(CONTROLS)}.")
        for name in ("control_seed", "max_new_tokens"):
            if name in found:
                if not found[name].isdecimal():
                    raise ConfigError(f"Reading {self.name}: {name} is {found[name]!r}, expected a number from 0 upwards.")
                found[name] = int(found[name])
        return found


def only(bank: Bank, names: set[str]) -> Bank:
    """The bank's prompts of these names."""
    chosen = [i for i, entry in enumerate(bank.entries) if str(entry["prompt_id"]) in names]
    return replace(bank, prompts=tuple(bank.prompts[i] for i in chosen), entries=tuple(bank.entries[i] for i in chosen))
