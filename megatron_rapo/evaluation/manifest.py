"""What an evaluation is of: model, problems, sampling. It stands in `evaluation.json`, beside the samples."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_rapo.errors import RapoError

FILE = "evaluation.json"
FORMAT = 1


class _Record(BaseModel):
    """Unknown keys are errors: a later format is not read as if it were this one."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRecord(_Record):
    """Which weights were sampled from.

    Attributes:
        path: HF directory, checkpoint, or run directory, as it was given.
        run: the training run's directory, where the weights are of one.
        step: the step that made them; 0 is the run's base.
        fingerprint: of the weights (`weights_fingerprint`); None where a run's engines had them from memory.
    """

    path: str
    run: str | None = None
    step: int | None = None
    fingerprint: str | None = None

    @property
    def label(self) -> str:
        """A short name for tables and plots."""
        if self.run is None:
            return Path(self.path).name
        return f"{Path(self.run).name} step {self.step}"


class DataRecord(_Record):
    """One data set of an evaluation.

    Attributes:
        name: of its folder.
        source: the file, or the generated task with its seed.
        problems: how many.
        fingerprint: of all ids, questions and answers, in order; same fingerprint, same problems.
    """

    name: str
    source: str
    problems: int
    fingerprint: str


class SettingRecord(_Record):
    """How responses were sampled.

    Log-probs are those of the temperature-scaled distribution, not renormalised for top-p or top-k.
    """

    name: str
    temperature: float
    top_p: float = 1.0
    top_k: int = -1
    max_response_tokens: int


class Manifest(_Record):
    """All that one must know of an evaluation to read its samples, or to go on with it.

    Attributes:
        samples: N: samples of every problem, or the most of any where the budget was adaptive.
        adaptive: correct samples at which a problem is done, where the budget is adaptive (`sequential`).
        seed: of the samples' seeds.
        date: the day that chat templates were told; None where there were none.
        prompts: the fingerprint of the templated prompts' tokens, by data set.
        environment: options of what makes episodes, as far as they are no defaults; None where an earlier
            version did not note them.
        code: of the user's own that judges, or makes episodes: fingerprints by its `module:name`.
        started, finished: UTC, ISO 8601; `finished` is None until every sample is on disk.
    """

    format: int = FORMAT
    model: ModelRecord
    data: tuple[DataRecord, ...]
    settings: tuple[SettingRecord, ...]
    samples: int
    adaptive: int | None = None
    seed: int
    date: str | None = None
    verifier: dict[str, str]
    prompts: dict[str, str]
    environment: dict[str, Any] | None = None
    code: dict[str, str] = {}
    versions: dict[str, str]
    started: str
    finished: str | None = None

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest of an evaluation's directory.

        Raises:
            RapoError: there is none, or it is not of this format.
        """
        file = directory / FILE
        try:
            return cls.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            raise RapoError(
                f"{directory} is no evaluation: it has no {FILE}; give a directory that "
                "`megatron-rapo evaluate` wrote, or one of a run's evaluations/"
            ) from None
        except (ValidationError, OSError) as error:
            raise RapoError(
                f"{file} is not a manifest of format {FORMAT}: {error}; "
                "evaluate again, into another directory"
            ) from error

    def going_on_from(self, before: Manifest, directory: Path) -> Manifest:
        """This evaluation, of which `before` is on disk: it keeps that beginning.

        Raises:
            RapoError: the samples of both would not belong together, or some would be left without purpose.
        """
        mine, theirs = self._identity(), before._identity()
        for what, (old, as_told) in theirs.items():
            if what not in mine:
                raise RapoError(
                    f"{directory} was begun with {what}, which is not asked for now; name it again beside "
                    "what is new, or choose another --out"
                )
            now, told_now = mine[what]
            if now != old:
                raise RapoError(
                    f"{directory} holds an evaluation that differs in {what} ({as_told}, now {told_now}); "
                    "restore it to go on there, or choose another --out"
                )
        if self.samples < before.samples:
            raise RapoError(
                f"{directory} was begun with {before.samples} samples a problem, more than the "
                f"{self.samples} of now; ask for no fewer, or choose another --out"
            )
        return self.model_copy(update={"started": before.started})

    def told_prompts(self, data: str) -> str:
        """What made a data set's prompts, for people: template and tokenizer have no names."""
        day = "" if self.date is None else f" of a chat template on {self.date}"
        return f"fingerprint {self.prompts[data]}{day}"

    def _identity(self) -> dict[str, tuple[object, str]]:
        """What samples depend on, by name: what must be the same, and how it is told."""
        model = self.model
        found: dict[str, tuple[object, str]] = {
            "the model": (model.fingerprint, f"{model.path}, fingerprint {model.fingerprint}"),
            "the seed": (self.seed, str(self.seed)),
            "the adaptive budget": (self.adaptive, str(self.adaptive or "none")),
        }
        for data in self.data:
            told = f"{data.source}, fingerprint {data.fingerprint}"
            found[f"data set {data.name}"] = (data.fingerprint, told)
        for name in self.prompts:
            found[f"the prompts of {name}"] = (self.prompts[name], self.told_prompts(name))
            found[f"the verifier of {name}"] = (self.verifier[name], self.verifier[name])
        if self.environment is not None:
            found["the environment"] = (self.environment, json.dumps(self.environment))
        for address, code in self.code.items():
            found[f"the code of {address}"] = (code, f"fingerprint {code}")
        for setting in self.settings:
            found[f"setting {setting.name}"] = (setting, str(setting))
        return found

    def write(self, directory: Path) -> None:
        """Writes or replaces it, whole."""
        partial = directory / f".{FILE}.partial"
        partial.write_text(self.model_dump_json(indent=1) + "\n")
        partial.replace(directory / FILE)


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
