r"""Problems of reasoning_gym (https://github.com/open-thought/reasoning-gym), and its own scores."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from megatron_rapo.config.data import ReasoningGymData
from megatron_rapo.data.columns import plain
from megatron_rapo.data.tasks.gym_draws import Request, make_dataset
from megatron_rapo.data.tasks.problem import Problem, Split
from megatron_rapo.errors import RapoError

_START_S, _A_PROBLEM_S = (
    300,
    60,
)  # generous: the slowest dataset takes 2 s a problem, of which 1 in 16 is kept
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOX = "\\boxed{"


def generate(config: ReasoningGymData, seed: int, split: Split, count: int, option: str) -> Sequence[Problem]:
    """`count` different problems, the same for the same arguments, in every process.

    Args:
        config: the dataset and its options.
        seed: the problems' own.
        split: which hangs on a problem's question, whatever the seed.
        count: how many.
        option: the table that the user set, as errors call it.

    Raises:
        RapoError: the package is not installed; there is no such dataset, it refuses the options, or has too
            few problems.
    """
    if find_spec("reasoning_gym") is None:
        raise RapoError(
            f'{option}.source = "reasoning_gym" needs the package reasoning_gym, which is not installed; '
            'pip install -c constraints.txt "megatron_rapo[reasoning_gym]"'
        )
    request = Request(config.dataset, config.options or {}, seed, split, count)
    found = _drawn(json.dumps(asdict(request)), count)
    if isinstance(found, str):
        raise RapoError(f"{option}.{found}" if found.startswith(("dataset", "options")) else found)
    return found


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


@lru_cache(maxsize=8)
def _drawn(request: str, count: int) -> list[Problem] | str:
    """What a process of its own drew, or what is wrong; kept, since the same are asked for again."""
    limit = _START_S + _A_PROBLEM_S * count
    try:
        process = subprocess.run(
            [sys.executable, "-m", "megatron_rapo.data.tasks.gym_draws"],
            input=request.encode(),
            capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RapoError(
            f"reasoning_gym did not draw {request} in {limit} s; ask for fewer, or easier problems"
        ) from error
    if process.returncode:
        last = process.stderr.decode(errors="replace").strip().splitlines()[-3:]
        raise RapoError(
            f"reasoning_gym failed to draw {request}: {' '.join(last)}; choose other options, or report "
            "it there"
        )
    found = pickle.loads(process.stdout)
    if isinstance(found, str):
        return found
    return [Problem(one.question, one.answer, plain(one.parts)) for one in found]


@lru_cache(maxsize=64)
def _dataset(name: str, options: str) -> Any:
    return make_dataset(name, json.loads(options))


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
