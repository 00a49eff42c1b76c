"""Gold answers judged against themselves when data are loaded: what no response can match is told then."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_rapo.config import RunConfig
from megatron_rapo.config.data import Data
from megatron_rapo.data.load import Judge
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.reward.verifier import Verifier

if TYPE_CHECKING:  # Megatron takes seconds, and commands on one process need none of it
    from megatron_rapo.parallel.placement import Placement

_INTEGER = re.compile(r"-?[0-9]{1,18}")  # matches itself under every verifier


def gold_judge(config: RunConfig, placement: Placement | None = None) -> Judge:
    """What `data.load` asks of golds, by the data's own verifier in processes that can be killed.

    Args:
        placement: of a job's ranks, all of which must then ask alike: the main rank judges, and others take
            its word, so that none keeps a prompt that another has dropped.
    """

    def judge(data: Data, golds: Sequence[str]) -> Sequence[str | None]:
        if placement is None:
            return _judge(config, data, golds)
        return placement.share_from_main(_judge(config, data, golds) if placement.is_main else None)

    return judge


def _judge(config: RunConfig, data: Data, golds: Sequence[str]) -> list[str | None]:
    """Why no response can match each gold; None where one can."""
    plan = config.verifier_of(data)
    if not plan.needs_answers:
        return [None] * len(golds)
    doubtful = [gold for gold in dict.fromkeys(golds) if not _INTEGER.fullmatch(gold)]
    if not doubtful:
        return [None] * len(golds)
    with Verifier.configured(plan, config.reward) as verifier:
        verified = dict(zip(doubtful, verifier.judge(doubtful), strict=True))
        late = [gold for gold in doubtful if verified[gold].outcome is Outcome.TIMEOUT]
        for gold in late:  # once more and alone, since the machine may have been busy
            verified |= {gold: verifier.judge([gold])[0]}
    whys = {gold: _why(verification) for gold, verification in verified.items()}
    return [whys.get(gold) for gold in golds]


def _why(verification: Verification) -> str | None:
    if verification.outcome is Outcome.CORRECT:
        return None
    return verification.why or "the verifier does not take it for equal to itself"
