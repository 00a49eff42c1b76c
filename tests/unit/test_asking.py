"""What a method asks for: in rounds, by guides, with seeds of its own, and trained under the right prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from megatron_rapo.config.data import CountdownData, FileData
from megatron_rapo.data.batching import pack
from megatron_rapo.data.guided import Guided, GuidedPrompts, TooLong
from megatron_rapo.data.load import _require_columns, load_prompts
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.environments.running import Tries
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.asking import ask
from megatron_rapo.experience.batch import Batch
from megatron_rapo.experience.collector import Collector
from megatron_rapo.experience.course import Wanted, follow
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.experience.summary import summarise
from megatron_rapo.methods.grpo import GRPO
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.policy.batch import make_samples
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import sample_seed
from tests import rounds
from tests.methods import a_method
from tests.runners import single_turns
from tests.stand_in import VOCAB, StandIn, stand_ins
from tests.unit.test_collector import make_collector
from tests.unit.test_data_formats import TOKENIZER, jsonl
from tests.unit.test_pages import ROOT, blocks

PROMPTS = [Prompt(10 + i, f"{i}?", (i, 7), "", draw=i) for i in range(4)]
HINTED = Guide(question="hinted", name="hint")


class SecondChance(GRPO):
    """Asks those of whose prompts the first token is even once more, with a hint; then for a given text."""

    def ask(self, groups: Sequence[Group]) -> list[list[Guide]]:
        given = Guide(response="given")
        after = {0: [PLAIN, PLAIN], 2: [HINTED, replace(HINTED, keeps_prompt=True)], 4: [given]}
        even = [group.problem.token_ids[0] % 2 == 0 for group in groups]
        return [
            after.get(len(group.episodes), []) if again or not group.episodes else []
            for group, again in zip(groups, even, strict=True)
        ]


METHOD = SecondChance(SecondChance.Options(), Sampling(1.0, 2, 8))


def guided(prompt: Prompt, guide: Guide) -> Guided:
    """Prompts of guides are one token longer."""
    asked = (*prompt.token_ids, 9) if guide.question else prompt.token_ids
    under = asked if guide.keeps_prompt else prompt.token_ids
    return Guided(asked, (), (5, 6) if guide.response else None, under)


def sampled(urls: list[str], method: GRPO = METHOD) -> Shared:
    with (
        EnginePool(urls, SGLangClient, vocab_size=VOCAB, prompts_per_request=1, request_timeout=60) as pool,
        single_turns(pool, guided=guided) as runner,
    ):
        collector = make_collector(pool, runner)
        return follow(ask(method, PROMPTS), lambda wanted: collect(collector, wanted.tries))


def collect(collector: Collector, tries: Sequence[Tries] | None) -> Shared:
    return rounds.collect(
        collector,
        PROMPTS,
        chosen=Sampling(1.0, 2, 8),
        weight_version=3,
        seed=5,
        tries=tries,
    )


def asked(servers: Sequence[StandIn]) -> Iterator[tuple[tuple[int, ...], int]]:
    for path, body in servers[0].asked:
        if path == "/generate":
            for prompt, params in zip(body["input_ids"], body["sampling_params"], strict=True):
                yield tuple(prompt), params["sampling_seed"]


def test_rounds_ask_for_their_prompts_with_seeds_of_their_own() -> None:
    with stand_ins(1) as (servers, urls):
        found = sampled(urls)
        wanted = [(p.token_ids, sample_seed(5, p, n)) for p in PROMPTS for n in (0, 1)]
        wanted += [((*p.token_ids, 9), sample_seed(5, p, n)) for p in PROMPTS[::2] for n in (2, 3)]
        assert sorted(asked(servers)) == sorted(wanted)
    assert [len(group.episodes) for group in found.groups] == [5, 2, 5, 2]
    assert [one.guide.name for one in found.groups[0].episodes] == ["", "", "hint", "hint", ""]
    for place, group in found.whole.items():
        assert group.brief().episodes == found.groups[place].episodes
    prompts = [one.episode.sequences[0].token_ids[:-2].tolist() for one in found.whole[2].episodes]
    assert prompts == [[2, 7], [2, 7], [2, 7], [2, 7, 9], [2, 7]], "trained under the wrong prompt"


def test_a_method_that_asks_nothing_of_its_own_asks_in_one_round_what_it_always_did() -> None:
    with stand_ins(1) as (servers, urls):
        plain = sampled(urls, cast(GRPO, a_method("grpo")))
        before = sorted(asked(servers))
        servers[0].asked.clear()

        class Same(GRPO):
            def ask(self, groups: Sequence[Group]) -> Any:
                return super().ask(groups)

        again = sampled(urls, Same(Same.Options(), Sampling(1.0, 2, 8)))
        assert sorted(asked(servers)) == before
    assert again.groups == plain.groups
    assert len(before) == 8


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (lambda groups: [[PLAIN]] * len(groups), "still wants more after 64 rounds"),
        (lambda groups: [[]] * len(groups), "wants no episode of a problem"),
        (
            lambda groups: [[PLAIN] if not g.episodes and n else [] for n, g in enumerate(groups)],
            "no episode",
        ),
        (lambda groups: [[PLAIN]], r"for 4 groups; return a list of guides for each"),
        (lambda groups: [["hint"]] * len(groups), r"return a list of guides for each"),
    ],
)
def test_what_cannot_be_asked_is_told(wanted: Callable[[Any], Any], said: str) -> None:
    class Wrong(GRPO):
        def ask(self, groups: Sequence[Group]) -> Any:
            return wanted(groups)

    def sample(round_: Wanted) -> Shared:
        tries = round_.tries
        assert tries is not None
        one = ScoredEpisode(Episode((), ""), Verification(Outcome.WRONG))
        groups = [Group(p.problem, (one,) * len(t.guides)) for p, t in zip(PROMPTS, tries, strict=True)]
        return Shared(groups, [0] * 4, dict(enumerate(groups)))

    with pytest.raises(RapoError, match=f"ask of method .* {said}"):
        follow(ask(Wrong(Wrong.Options(), Sampling(1.0, 2, 8)), PROMPTS), sample)


def test_what_does_not_fit_is_an_episode_of_unknown_reward() -> None:
    def too_long(prompt: Prompt, guide: Guide) -> Guided:
        raise TooLong("the prompt of a hint has 9 tokens")

    with (
        stand_ins(1) as (servers, urls),
        EnginePool(urls, SGLangClient, vocab_size=VOCAB, prompts_per_request=1, request_timeout=60) as pool,
        single_turns(pool, guided=too_long) as runner,
    ):
        found = collect(make_collector(pool, runner), [Tries(0, (PLAIN, HINTED))] * 4)
        assert len(list(asked(servers))) == 4
    assert [g.rewards for g in found.groups] == [[1.0, None]] * 4
    assert found.groups[0].episodes[1].verification.why == "the prompt of a hint has 9 tokens"


def test_a_head_whose_prompts_have_enough_samples_nothing() -> None:
    with (
        stand_ins(1) as (servers, urls),
        EnginePool(urls, SGLangClient, vocab_size=VOCAB, prompts_per_request=1, request_timeout=60) as pool,
        single_turns(pool, guided=guided) as runner,
    ):
        found = collect(make_collector(pool, runner), [Tries(2, ())] * 4)
        assert not list(asked(servers))
    assert [group.episodes for group in found.groups] == [()] * 4


def test_a_sequence_takes_another_prompt() -> None:
    own = TokenSequence.of_response((1, 2, 3), np.array([4, 5], np.int32), np.array([-1, -2], np.float32), 7)
    other = own.under((1, 2, 3), (9,))
    assert (other.token_ids.tolist(), other.sampled.tolist()) == ([9, 4, 5], [False, True, True])
    assert (other.log_probs[1:].tolist(), other.versions.tolist()) == ([-1, -2], [-1, 7, 7])
    for wrong in ((1, 3), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match="does not begin with the prompt"):
            own.under(wrong, (9,))


def test_a_given_response_is_trained_on_without_an_engines_log_probs() -> None:
    taught = TokenSequence.of_text((1, 2), (3, 4, 5))
    assert (taught.sampled_tokens, taught.trained_tokens) == (0, 3)
    assert taught.brief().trained_tokens == 3
    scored = ScoredEpisode(Episode((taught,), "x"), Verification(Outcome.WRONG), Guide(response="x"))
    ((sample,),) = make_samples([Group(PROMPTS[0].problem, (scored,))], a_method("rapo"), 50, 1)
    assert (sample.off_policy, sample.token_weight) == (True, 1 / 3)
    batch = pack([sample], sequence_multiple=4)
    assert batch.response_positions.tolist() == [-1, 0, 1, 2, -1, -1, -1, -1]
    assert batch.targets[batch.is_response].tolist() == [3, 4, 5]
    assert batch.engine_log_probs.tolist() == [0.0] * 8
    assert batch.off_policy.tolist() == [False, True, True, True] + [False] * 4


def test_what_was_guided_is_told_apart() -> None:
    def one(outcome: Outcome, guide: Guide) -> ScoredEpisode:
        own = TokenSequence.of_response((1,), np.array([4], np.int32), np.array([-1], np.float32), 7)
        return ScoredEpisode(Episode((own,), ""), Verification(outcome), guide)

    plain, hinted = one(Outcome.WRONG, PLAIN), one(Outcome.CORRECT, HINTED)
    groups = [Group(PROMPTS[0].problem, (plain, plain, hinted)), Group(PROMPTS[1].problem, (plain,))]
    metrics = summarise(Batch(groups, Shared(groups), 0), 50)
    assert (metrics["reward/mean"], metrics["rollout/guided_reward"]) == (0.0, 1.0)
    assert metrics["rollout/guided"] == 0.25
    assert metrics["reward/groups_all_fail"] == 1.0
    whole = [Group(PROMPTS[0].problem, (hinted,))]
    assert "rollout/guided_reward" not in (told := summarise(Batch(whole, Shared(whole), 0), 50))
    assert told["reward/mean"] == 1.0


def test_the_pages_guides_are_what_it_says_of_them() -> None:
    [block] = [text for text in blocks(ROOT / "docs/methods.md", "python") if "Guide(" in text]
    lines = [line for line in block.splitlines() if line.startswith("Guide(")]
    guides = [eval(line, {"Guide": Guide}) for line in lines]
    assert guides[0] == PLAIN
    assert [guide.is_off_policy for guide in guides] == [False, True, False, False, True, False, True, True]


# Guides in tokens


def prompts_of(data: Any, *, prompt_tokens: int = 200, response_tokens: int = 20) -> GuidedPrompts:
    config = SimpleNamespace(
        rollout=SimpleNamespace(max_prompt_tokens=prompt_tokens, max_response_tokens=response_tokens),
        run=SimpleNamespace(date=None, code=[]),
        environment=SimpleNamespace(tools=[]),
        training_sources=[data],
        training_tables=["data"],
    )
    return GuidedPrompts(cast(Any, config), TOKENIZER)


def first_of(data: Any) -> Prompt:
    return load_prompts(data, TOKENIZER, max_prompt_tokens=200, split="train", count=None)[0]


def test_another_question_stands_in_the_datas_template(tmp_path: Any) -> None:
    chat = {"messages": [{"role": "system", "content": "brief"}, {"role": "user", "content": "1+1"}]}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"question": "1+1", "answer": "2"}, {"system_prompt": "be"}, "system:be\nuser:HINT\nassistant:"),
        (
            {**chat, "answer": "2"},
            {"format": "messages", "template": "chat"},
            "system:brief\nuser:HINT\nassistant:",
        ),
        (
            {"question": "1+1", "answer": "2", "level": "3"},
            {"template": "{{ problem.level }}) {{ problem.question }}"},
            "3) HINT",
        ),
    ]
    for number, (row, options, text) in enumerate(cases):
        (folder := tmp_path / str(number)).mkdir()
        data = FileData(
            source="file",
            path=jsonl(folder, row),
            **{"template_text": "{prompt}", **options} if "template" not in options else options,
        )
        prompt, made = first_of(data), prompts_of(data)
        found = made(prompt, Guide(question="HINT"))
        assert TOKENIZER.decode(found.prompt) == text
        assert found.trained_under == prompt.token_ids
        assert made(prompt, Guide(question="HINT", keeps_prompt=True)).trained_under == found.prompt
        again = made(prompt, Guide(question=prompt.question))
        assert again.prompt == prompt.token_ids, "the same question is another prompt"


def test_a_chat_among_texts_may_be_asked_another_question(tmp_path: Any) -> None:
    rows = [{"prompt": "1+1", "label": "2"}, {"prompt": [{"role": "user", "content": "2+2"}], "label": "4"}]
    data = FileData(source="file", path=jsonl(tmp_path, *rows), format="slime", template_text="Q: {prompt}")
    text, chat = load_prompts(data, TOKENIZER, max_prompt_tokens=200, split="train", count=None)
    asked = [prompts_of(data)(prompt, Guide(question="HINT")).prompt for prompt in (text, chat)]
    assert list(map(TOKENIZER.decode, asked)) == ["user:Q: HINT\nassistant:", "user:HINT\nassistant:"]


def test_generated_problems_are_asked_as_they_stand() -> None:
    data = CountdownData(source="countdown", numbers=3, problems=10)
    prompt = first_of(data)
    found = prompts_of(data)(prompt, Guide(question="1 2 3=6:", begins="1+"))
    assert TOKENIZER.decode(found.prompt) == "1 2 3=6:"
    assert TOKENIZER.decode(found.begins) == "1+"


def test_a_given_response_ends_as_the_policys_are_to_end() -> None:
    data = CountdownData(source="countdown", numbers=3, problems=10)
    prompt, made = first_of(data), prompts_of(data)
    response = made(prompt, Guide(response="1+2")).response
    assert response is not None
    assert TOKENIZER.decode(response) == "1+2<|im_end|>"
    with pytest.raises(RapoError, match=r"given to problem 0 is blank; leave it out"):
        made(prompt, Guide(response=" "))


@pytest.mark.parametrize(
    ("guide", "said"),
    [
        (Guide(question="9" * 31, name="hint"), r"prompt of a hint has 31 tokens, more .*max_prompt_tokens"),
        (Guide(response="9" * 20, name="solution"), r"a solution gives 21 tokens of the response"),
        (Guide(begins="9" * 20), r"a guide gives 20 tokens of the response.*max_response_tokens = 20"),
    ],
)
def test_what_is_too_long_is_told(guide: Guide, said: str) -> None:
    data = CountdownData(source="countdown", numbers=3, problems=10)
    with pytest.raises(TooLong, match=said):
        prompts_of(data, prompt_tokens=30)(first_of(data), guide)


def test_a_column_that_a_method_reads_must_be_there(tmp_path: Any) -> None:
    class Reads(GRPO):
        columns = ("solution",)

    config: Any = SimpleNamespace(
        new_method=lambda: Reads(Reads.Options(), Sampling(1.0, 2, 8)),
        algorithm=SimpleNamespace(method="reads"),
    )
    row = {"question": "1+1", "answer": "2"}
    for rows, fits in (
        ([row], False),
        ([{**row, "solution": ""}], False),
        ([row, {**row, "solution": "2"}], True),
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        data = FileData(source="file", path=path)
        loaded = load_prompts(data, TOKENIZER, max_prompt_tokens=200, split="train", count=None)
        if fits:
            _require_columns(config, loaded, "data")
        else:
            with pytest.raises(
                RapoError, match=r'method "reads" reads the column .solution. .* no row of data has'
            ):
                _require_columns(config, loaded, "data")
