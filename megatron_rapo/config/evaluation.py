"""The options of evaluation: which problems, how many samples, how they are drawn."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from megatron_rapo.config.data import Data
from megatron_rapo.section import PositiveFloat, PositiveInt, Section


class Setting(Section):
    """One way to sample, a table of `[[evaluate.settings]]`."""

    temperature: PositiveFloat = Field(1.0, description="Sampling temperature.")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Nucleus: the likeliest tokens that reach this probability may be drawn.",
    )
    top_k: PositiveInt | None = Field(
        None, description="So many likeliest tokens may be drawn. Default: all."
    )
    max_response_tokens: PositiveInt | None = Field(
        None, description="Default: `rollout.max_response_tokens`."
    )

    @property
    def name(self) -> str:
        """What its samples are filed under: `t0.6-p0.95`."""
        parts = [f"t{self.temperature:g}"]
        if self.top_p < 1:
            parts.append(f"p{self.top_p:g}")
        if self.top_k is not None:
            parts.append(f"k{self.top_k}")
        if self.max_response_tokens is not None:
            parts.append(f"l{self.max_response_tokens}")
        return "-".join(parts)


def _as_list(value: Any) -> Any:
    """One table stands for a list of one."""
    return [value] if isinstance(value, dict) else value


class Evaluate(Section):
    """pass@k on held-out problems, before the first step and after the last; nothing without this table."""

    problems: PositiveInt | None = Field(
        None,
        description="Held-out problems of each data set. Default: all of a file, 64 of a generated task.",
    )
    samples: PositiveInt = Field(16, description="N: responses a problem.")
    k: list[PositiveInt] = Field([1, 4, 16], description="The k of pass@k, each at most `samples`.")
    every: PositiveInt | None = Field(
        None, description="Also after every so many steps. Default: only before the first and after the last."
    )
    data: Annotated[list[Data], BeforeValidator(_as_list)] | None = Field(
        None,
        description="Where the problems come from, one table or several (`[[evaluate.data]]`). Default: the "
        "test split of a generated task; training from a file needs one here.",
    )
    settings: list[Setting] = Field(
        [],
        description="How responses are sampled (`[[evaluate.settings]]`). Default: one setting, with "
        "`rollout.temperature` and full support.",
    )
    best: str | None = Field(
        None,
        description="Metric of the best checkpoint, such as `pass@1` or `maj@16`; or `reward`, where that is "
        "not right or wrong alone (with several data sets or settings `DATA/SETTING/pass@1`). A step with a "
        "new highest value is saved, and its checkpoint kept beside the newest; `checkpoints/best.json` "
        "names it.",
    )
    batch: PositiveInt = Field(
        1024,
        description="Responses that are asked for together, verified together, and written as one part. Two "
        "such batches are under way, so that engines work while the one before is verified.",
    )

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        if not self.k or max(self.k) > self.samples:
            raise ValueError(f"k = {self.k} needs values from 1 to samples = {self.samples}")
        for option, names in {
            "data": [data.name for data in self.data or []],
            "settings": [setting.name for setting in self.settings],
        }.items():
            for name, times in Counter(names).items():
                if times > 1:
                    raise ValueError(f'{option} names "{name}" {times} times; leave one, or give them names')
        if self.data == []:
            raise ValueError("data = [] has no problems; name a data set, or leave it out")
        return self
