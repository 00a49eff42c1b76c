r"""The scores of reasoning_gym (https://github.com/open-thought/reasoning-gym) itself.

The package is imported with this module: a verifier's process imports it before its time counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from reasoning_gym.factory import create_dataset

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOX = "\\boxed{"


def score(response: str, problem: Mapping[str, Any]) -> float:
    """What the dataset's own `score_answer` gives the response's final answer, from 0 to 1.

    An answer that it cannot read (it raises, where the gold answer does not make it) scores 0.

    Args:
        response: of the policy.
        problem: with the columns of a problem that `generate` drew.
    """
    dataset = _dataset(problem["dataset"], json.dumps(problem["options"]))
    answer = final_answer(response)
    entry = dict(problem)
    try:
        return float(dataset.score_answer(answer, entry))
    except Exception:
        dataset.score_answer(entry["answer"], entry)  # if this fails, too, it is no fault of the response
        return 0.0


def final_answer(response: str) -> str | None:
    r"""What the last closed `\boxed{…}` holds; or else the last `<answer>…</answer>`; or else the last line.

    None where nothing is there.
    """
    boxed = _last_box(response)
    if boxed is None and (tagged := _TAGGED.findall(response)):
        boxed = tagged[-1]
    if boxed is None:
        boxed = response.rstrip().rpartition("\n")[2]
    return boxed.strip() or None


@lru_cache(maxsize=64)
def _dataset(name: str, options: str) -> Any:
    return create_dataset(name, **json.loads(options))


def _last_box(response: str) -> str | None:
    r"""What the last `\boxed{…}` with balanced braces holds."""
    start = len(response)
    while (start := response.rfind(_BOX, 0, start)) >= 0:
        depth = 1
        for place in range(start + len(_BOX), len(response)):
            depth += {"{": 1, "}": -1}.get(response[place], 0)
            if depth == 0:
                return response[start + len(_BOX) : place]
    return None
