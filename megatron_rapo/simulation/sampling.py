"""What a simulated run samples with: engines, lengths, verifiers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import simpy

from megatron_rapo.config import RunConfig
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.experience.course import Phase
from megatron_rapo.simulation.engine import Request
from megatron_rapo.simulation.lengths import Lengths
from megatron_rapo.simulation.pool import Pool, Round

Rewards = Sequence[float] | None


def pass_time(world: simpy.Environment, seconds: float) -> None:
    """Lets so much time pass."""
    if (until := world.now + seconds) > world.now:
        world.run(until=until)


class Prompts:
    """An endless order of prompts that nobody reads (`experience.batch.Prompts`).

    Attributes:
        position: prompts drawn so far.
        size: different ones; more than any batch has.
    """

    size = 1 << 40

    def __init__(self) -> None:
        self.position = 0

    def draw(self, count: int) -> list[Prompt]:
        """The next `count`."""
        first, self.position = self.position, self.position + count
        return [Prompt(draw, "", (), "", draw) for draw in range(first, first + count)]


@dataclass
class Sampler:
    """The parts that rounds and windows share.

    Attributes:
        world: whose time it is.
        config: of the run.
        pool: of the engines.
        lengths: of responses.
        prompt_tokens: of each prompt.
        verifications_per_s: of all verifiers together.
        seed: of what is drawn.
        publish: has engines get a version of the weights again, where too many are lost.
    """

    world: simpy.Environment
    config: RunConfig
    pool: Pool
    lengths: Lengths
    prompt_tokens: int
    verifications_per_s: float
    seed: int
    publish: Callable[[int], None]

    def draw(
        self, seed: int, prompts: Sequence[Prompt], counts: Sequence[int], longest: int
    ) -> list[tuple[list[int], Rewards]]:
        """Lengths and rewards of the prompts' responses: the same in each mode, whoever samples them when."""
        random = np.random.default_rng([self.seed, seed, prompts[0].draw])
        lengths, rewards = self.lengths.draw(random, counts, longest)
        earned: Sequence[Rewards] = [None] * len(counts)
        if rewards is not None:
            earned = [of_group.tolist() for of_group in rewards]
        return list(zip([of_group.tolist() for of_group in lengths], earned, strict=True))

    def parts(self, prompts: int) -> list[list[int]]:
        """Places of the prompts that share a request, in the order in which heads send them."""
        heads = self.config.parallel.data_parallel
        parts = []
        for head in range(min(heads, prompts)):
            own = list(range(head, prompts, heads))
            most = 1 if self.config.rollout.engine.by_router else self.config.rollout.prompts_per_request
            size = min(most, max(1, -(-len(own) // self.pool.size)))
            parts += [(start, head, own[start : start + size]) for start in range(0, len(own), size)]
        return [part for _, _, part in sorted(parts)]

    def wait(self, begun: Round, phase: Phase) -> list[Request]:
        """Until a round is over; what is missing then."""
        with phase("rollout"):
            if not begun.over.processed:
                self.world.run(until=begun.over)
        return begun.missing

    def recover(self, phase: Phase, version: int) -> None:
        """Has enough engines serve a version of the weights again."""
        with phase("publish"):
            self.publish(version)

    def judge(self, requests: Iterable[Request], phase: Phase) -> None:
        """Until all responses are judged, which began as they came."""
        ends = np.sort(np.concatenate([np.zeros(0), *(request.ends for request in requests)]))
        with phase("reward"):
            if len(ends):
                left = np.arange(len(ends), 0, -1) / self.verifications_per_s
                pass_time(self.world, float(np.max(ends + left)) - self.world.now)
