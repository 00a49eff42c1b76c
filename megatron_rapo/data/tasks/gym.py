"""Problems of reasoning_gym (https://github.com/open-thought/reasoning-gym)."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib.util import find_spec

from megatron_rapo.config.data import ReasoningGymData
from megatron_rapo.data.columns import plain
from megatron_rapo.data.tasks.gym_draws import Request
from megatron_rapo.data.tasks.problem import Problem, Split
from megatron_rapo.errors import RapoError

# Generous: the slowest dataset takes 2 s a problem, of which 1 in 16 is kept.
_START_S, _A_PROBLEM_S = 300, 60


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
            'pip install -c constraints.txt "megatron_rapo[gym]"'
        )
    request = Request(config.dataset, config.options or {}, seed, split, count)
    found = _drawn(json.dumps(asdict(request)), count)
    if isinstance(found, str):
        raise RapoError(f"{option}.{found}" if found.startswith(("dataset", "options")) else found)
    return found


@lru_cache(maxsize=8)
def _drawn(request: str, count: int) -> list[Problem] | str:
    """What a process of its own drew, or what is wrong; kept, since the same are asked for again."""
    limit = _START_S + _A_PROBLEM_S * count
    try:
        process = subprocess.run(
            [sys.executable, "-P", "-m", "megatron_rapo.data.tasks.gym_draws"],
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
