"""Guides on a real embedded server: what was asked, by which seed, and under which prompt it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rapo.config.data import CountdownData
from megatron_rapo.config.environment import EnvironmentOptions
from megatron_rapo.data.guided import GuidedPrompts
from megatron_rapo.data.load import load_prompts
from megatron_rapo.environments.runner import Runner
from megatron_rapo.environments.running import EpisodeRunner
from megatron_rapo.environments.single_turn import SingleTurn
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.experience.asking import ask
from megatron_rapo.experience.course import follow
from megatron_rapo.methods.grpo import GRPO
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.rollout.requests import Ask, Request, sample_seed
from megatron_rapo.rollout.requests import Sampling as OfRound
from tests.rounds import collect
from tests.unit.test_collector import make_collector
from tests.unit.test_rollout_servers import make_pool, start

MODEL = Path(__file__).parents[2] / "examples/models/tiny-countdown"
SEED, TOKENS = 5, 12
GIVEN = "1+2"


class AllGuides(GRPO):
    """Two plain episodes; then, once they are seen, one of each guide."""

    def ask(self, groups: Sequence[Group]) -> list[list[Guide]]:
        def wanted(group: Group) -> list[Guide]:
            hinted = "1+" + group.problem.question
            steered = [Guide(question=hinted), Guide(question=hinted, keeps_prompt=True), Guide(begins="1+")]
            after = {0: [PLAIN, PLAIN], 2: [*steered, Guide(response=GIVEN)]}
            return after.get(len(group.episodes), [])

        return list(map(wanted, groups))


def test_guides_reach_the_engine_with_their_seeds_and_come_back_under_their_prompts(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    data = CountdownData(source="countdown", numbers=3, problems=4)
    prompts = load_prompts(data, tokenizer, max_prompt_tokens=32, split="train", count=4).prompts
    config = SimpleNamespace(
        rollout=SimpleNamespace(max_prompt_tokens=32, max_response_tokens=TOKENS),
        run=SimpleNamespace(date=None, code=[]),
        environment=SimpleNamespace(tools=[]),
        training_sources=[data],
        training_tables=["data"],
    )
    method = AllGuides(AllGuides.Options(), Sampling(1.0, 2, TOKENS))
    of_round = OfRound(1, TOKENS, 1.0, 0, SEED)
    with start(MODEL, tmp_path) as servers, make_pool(servers, vocab_size=len(tokenizer)) as pool:
        pool.wait_until_healthy(60)
        pool.update_weights(MODEL, 0)
        episodes = EpisodeRunner(
            SingleTurn(),
            EnvironmentOptions(),
            tokenizer,
            1.0,
            len(tokenizer),
            GuidedPrompts(cast(Any, config), tokenizer),
        )
        with Runner(episodes, pool) as runner:
            collector = make_collector(pool, runner)

            def sampled() -> list[Group]:
                found = follow(
                    ask(method, prompts),
                    lambda wanted: collect(
                        collector,
                        prompts,
                        chosen=method.sampling(),
                        weight_version=0,
                        seed=SEED,
                        tries=wanted.tries,
                    ),
                )
                return [group for _, group in sorted(found.whole.items())]

            groups, again = sampled(), sampled()
        first = prompts[0]
        asked = [first.question] * 2 + ["1+" + first.question] * 2 + [first.question + "1+"]
        asks = [
            Ask(
                "a prompt",
                tuple(tokenizer.encode(text, add_special_tokens=False)),
                sample_seed(SEED, first, n),
                1,
            )
            for n, text in enumerate(asked)
        ]
        with pool.round() as opened:
            alone = [opened.ask(Request((one,), of_round)).result()[0].token_ids[0] for one in asks]

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for prompt, group, repeated in zip(prompts, groups, again, strict=True):
        plain = list(prompt.token_ids)
        hinted = tokenizer.encode("1+" + prompt.question, add_special_tokens=False)
        begun = plain + tokenizer.encode("1+", add_special_tokens=False)
        sequences = [one.episode.sequences[0] for one in group.episodes]
        given_under = [plain, plain, hinted, hinted, begun]
        trained_under = [plain, plain, plain, hinted, begun]
        for sequence, seen, under in zip(sequences[:5], given_under, trained_under, strict=True):
            assert sequence.token_ids[~sequence.trained].tolist() == under
            response = sequence.token_ids[sequence.sampled].tolist()
            ids = torch.tensor([[*seen, *response]])
            with torch.inference_mode():
                logits = model(ids).logits[0, len(seen) - 1 : -1, : len(tokenizer)]
            expected = logits.log_softmax(-1).gather(-1, ids[0, len(seen) :, None])[:, 0]
            np.testing.assert_allclose(sequence.log_probs[sequence.sampled], expected.numpy(), atol=1e-4)
        taught = sequences[5]
        assert tokenizer.decode(taught.token_ids[taught.trained], skip_special_tokens=True) == GIVEN
        assert taught.token_ids[~taught.trained].tolist() == plain
        same = [one.episode.sequences[0].token_ids.tolist() for one in repeated.episodes]
        assert same == [sequence.token_ids.tolist() for sequence in sequences]
    own = [one.episode.sequences[0] for one in groups[0].episodes[:5]]
    assert [int(sequence.token_ids[sequence.sampled][0]) for sequence in own] == list(map(int, alone))
