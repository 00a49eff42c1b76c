"""Simulated runs: engines beside one simulated token by token, steps beside sums made by hand, marks."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simpy

from megatron_rapo.cli import main
from megatron_rapo.config import Parallel, RunConfig, load_config
from megatron_rapo.errors import RapoError
from megatron_rapo.observe.step_lines import read_step_lines
from megatron_rapo.planning.engine_cost import EngineSplit
from megatron_rapo.planning.layouts import Division, TrainerLayout
from megatron_rapo.planning.plan import Planner
from megatron_rapo.planning.profile import Profile
from megatron_rapo.planning.workload import workload_of
from megatron_rapo.record.standing import check_standing
from megatron_rapo.simulation.conditions import Conditions
from megatron_rapo.simulation.correction import corrected_by
from megatron_rapo.simulation.engine import Engine, Request
from megatron_rapo.simulation.lengths import Lengths, exponential, read_lengths
from megatron_rapo.simulation.run import simulate
from megatron_rapo.simulation.seconds import Corrected, Correction, Seconds
from megatron_rapo.timeline.idle import idle_by_cause
from megatron_rapo.timeline.trace import load
from tests.unit.test_memory import QWEN2_7B
from tests.unit.test_planning import EXAMPLE, LOAD, config, profile

Json = dict[str, Any]


class HandMade:
    """Rates that anybody can add up: linear in batch and context."""

    def decode_s(self, batch: int, context: float) -> float:
        return 1.0 + 0.5 * batch + 0.001 * batch * context

    def prefill_s(self, contexts: int, tokens: float) -> float:
        return 0.01 * contexts * tokens


def token_by_token(
    requests: Sequence[tuple[float, Request]], room: int, *, one_at_a_time: bool
) -> dict[int, float]:
    """When each request is answered: every token of every response, one after the other.

    What has come joins before a token; `prefill` of a request counts once, where its first response begins.
    """
    now, waiting, running = 0.0, [], []  # type: ignore[var-annotated]
    coming, answered = sorted(requests, key=lambda one: one[0]), {}
    left = {id(request): len(request) for _, request in requests}
    while coming or waiting or running:
        while coming and coming[0][0] <= now + 1e-9:
            _, request = coming.pop(0)
            waiting += [
                [request, place, tokens, context]
                for place, (tokens, context) in enumerate(zip(request.tokens, request.contexts, strict=True))
            ]
        alone = one_at_a_time and bool(running)
        while waiting and not alone and len(running) < room:
            one = waiting.pop(0)
            if one[1] == 0:
                now += 0.01 * one[0].prefilled * np.mean(one[0].contexts)
            running.append(one)
            alone = one_at_a_time and one[1] == len(one[0]) - 1
        if not running:
            now = coming[0][0]
            continue
        context = float(np.mean([one[3] for one in running])) + 0.5
        now += HandMade().decode_s(len(running), context)
        for one in running:
            one[2] -= 1
            one[3] += 1
        for one in [one for one in running if not one[2]]:
            running.remove(one)
            left[id(one[0])] -= 1
            if not left[id(one[0])]:
                answered[one[0].number] = now
    return answered


@pytest.mark.parametrize("one_at_a_time", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_an_engine_answers_as_one_that_is_simulated_token_by_token(seed: int, one_at_a_time: bool) -> None:
    draw = random.Random(seed)
    requests = []
    for number in range(draw.randint(1, 5)):
        size = draw.randint(1, 4)
        tokens = [draw.randint(1, 40) for _ in range(size)]
        requests.append((0.0, Request(tokens, [draw.randint(1, 60)] * size, 1, number)))
    room = 1 << 30 if one_at_a_time else draw.randint(1, 6)
    found: dict[int, float] = {}
    world = simpy.Environment()

    def answered(engine: Engine, request: Request, begun: float) -> None:
        found[request.number] = world.now
        assert sorted(request.ends) == request.ends and request.ends[-1] == pytest.approx(world.now)

    engine = Engine(world, "one", HandMade(), room, answered, one_at_a_time=one_at_a_time)
    for _, request in requests:
        engine.take(request)
    world.run()
    expected = token_by_token(requests, room, one_at_a_time=one_at_a_time)
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_request_that_comes_while_others_decode_joins_them() -> None:
    """8 tokens alone, then beside a second response for its 10, then the rest of the first alone."""
    world, found = simpy.Environment(), {}
    first, second = Request([30], [0], 1, 0), Request([10], [0], 1, 1)

    class Plain:
        def decode_s(self, batch: int, context: float) -> float:
            return float(batch)

        def prefill_s(self, contexts: int, tokens: float) -> float:
            return 0.0

    engine = Engine(
        world,
        "one",
        Plain(),
        8,
        lambda _, one, __: found.update({one.number: world.now}),
        one_at_a_time=False,
    )
    engine.take(first)
    world.run(until=8.0)
    engine.take(second)
    world.run()
    assert found == pytest.approx({1: 8 + 10 * 2, 0: 8 + 10 * 2 + 12})


def test_an_engine_that_fails_gives_back_what_it_had() -> None:
    world, found = simpy.Environment(), []
    engine = Engine(world, "one", HandMade(), 8, lambda _, one, __: found.append(one), one_at_a_time=False)
    requests = [Request([10, 20], [5, 5], 1, number) for number in range(2)]
    for request in requests:
        engine.take(request)
    world.run(until=3.0)
    assert list(engine.fail()) == requests and not engine.live
    world.run()
    assert not found and all(not request.ends for request in requests)
    engine.live = True
    engine.take(requests[1])
    world.run()
    assert found == [requests[1]] and len(requests[1].ends) == 2


ONE_LENGTH = Lengths([np.full(8, 64)], None, "a test")
WORK = {"prompts_per_step": 8, "max_prompt_tokens": 16, "max_response_tokens": 64}


def seconds_of(
    *,
    max_staleness: int = 0,
    engines: int = 2,
    device: Profile | None = None,
    correction: Correction | None = None,
    **rollout: Any,
) -> tuple[RunConfig, Seconds]:
    """A trainer of one rank beside so many engines."""
    ahead = {"max_staleness": max_staleness} if max_staleness else {}
    options = {**WORK, "engine": {"kind": "vllm", "servers": engines}, **ahead, **rollout}
    chosen = config(run={"directory": "run", "steps": 6}, rollout=options)
    rates = device or profile(engine={"step_s": 0.1, "layer_s": 0.0, "response_s": 0.01})
    planner = Planner(chosen, QWEN2_7B, workload_of(chosen), rates)
    layout = TrainerLayout(Parallel(), chosen.algorithm.max_tokens_per_microbatch, "none")
    way = planner.predict(Division(1, engines, False), layout, EngineSplit(engines, 1), max_staleness)
    return chosen, Seconds(planner, way, correction or Correction())


def steps_of(
    folder: Path, chosen: RunConfig, seconds: Seconds, lengths: Lengths = ONE_LENGTH, **conditions: Any
) -> list[Json]:
    simulate(chosen, seconds, lengths, Conditions(**conditions), folder)
    return [line for line in read_step_lines(folder / "metrics.jsonl") if line["step"] > 0]


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_where_nothing_is_random_a_step_takes_what_the_plan_says(tmp_path: Path, max_staleness: int) -> None:
    """Prefill counts in the simulation by the request, and in the plan by the engine: the same here."""
    chosen, seconds = seconds_of(max_staleness=max_staleness)
    steps = steps_of(tmp_path / "run", chosen, seconds)
    assert len(steps) == 6
    for line in steps[1 + max_staleness : -1]:  # the last has no batch beside it
        assert line["time/step_s"] == pytest.approx(seconds.way.step_s, rel=2e-3)
        assert line["time/sampling_s"] == pytest.approx(seconds.way.rollout_s, rel=2e-3)
        assert line["time/update_s"] == pytest.approx(seconds.way.trainer.update)
        assert line["rollout/staleness_max"] == max_staleness
        assert line["rollout/response_tokens_mean"] == 64
    idle = idle_by_cause(load(tmp_path / "run"))
    assert set(idle) == {"engine 0", "engine 1"}
    if not max_staleness:
        parts = idle["engine 0"]
        assert parts["rollout"] == pytest.approx(0.0, abs=1e-3)
        assert parts["update"] == pytest.approx(6 * seconds.way.trainer.update, rel=1e-3)
        assert parts["busy"] == pytest.approx(6 * seconds.way.rollout_s, rel=2e-3)


def test_ahead_takes_the_longer_of_sampling_and_training(tmp_path: Path) -> None:
    """Slow engines are what a step takes; else the trainer is."""
    found = {}
    for name, rate in (("slow", 20.0), ("fast", 1e-4)):
        device = profile(engine={"step_s": rate, "layer_s": 0.0, "response_s": 0.0})
        chosen, seconds = seconds_of(max_staleness=1, device=device)
        steps = steps_of(tmp_path / name, chosen, seconds)
        found[name] = steps[3]["time/step_s"]
        longest = max(seconds.way.rollout_s, seconds.way.trainer.total)
        assert found[name] == pytest.approx(longest + seconds.way.publish_s, rel=1e-2)
    assert found["slow"] > found["fast"]


def test_partial_responses_are_sampled_by_the_versions_of_the_schedule(tmp_path: Path) -> None:
    """Of 64 tokens, 16 by each version: step t's by those of t − 4, t − 3 and t − 2, the last to its end."""
    chosen, seconds = seconds_of(max_staleness=3, partial_tokens=16)
    steps = steps_of(tmp_path / "run", chosen, seconds)
    shares = {name: steps[5][name] for name in steps[5] if name.startswith("rollout/staleness/")}
    assert shares == pytest.approx(
        {"rollout/staleness/1": 0.5, "rollout/staleness/2": 0.25, "rollout/staleness/3": 0.25}
    )
    assert steps[0]["rollout/staleness_max"] == 0
    assert steps[5]["rollout/carried_over"] == 1.0


def test_each_mode_samples_the_same_lengths(tmp_path: Path) -> None:
    lengths = exponential(replace(LOAD, response_tokens=20, longest=64))
    means = []
    for number, ahead in enumerate(({}, {"max_staleness": 2}, {"max_staleness": 3, "partial_tokens": 16})):
        chosen, seconds = seconds_of(**ahead)
        steps = steps_of(tmp_path / str(number), chosen, seconds, lengths)
        means.append([line["rollout/response_tokens_mean"] for line in steps])
    assert means[0] == means[1] == means[2]
    assert len(set(means[0])) > 1


def test_stragglers_hold_all_others_up(tmp_path: Path) -> None:
    chosen, seconds = seconds_of()
    plain = steps_of(tmp_path / "plain", chosen, seconds)[2]
    slow = steps_of(tmp_path / "slow", chosen, seconds, stragglers=1.0, straggler_factor=3.0)[2]
    for name in ("rollout", "annotate", "update"):
        assert slow[f"time/{name}_s"] == pytest.approx(3 * plain[f"time/{name}_s"], rel=1e-6)
    assert slow["time/publish_s"] == plain["time/publish_s"]
    some = steps_of(tmp_path / "some", chosen, seconds, stragglers=0.5, straggler_factor=3.0)
    assert {round(line["time/update_s"] / plain["time/update_s"]) for line in some} == {1, 3}


@pytest.mark.parametrize("ahead", [{}, {"max_staleness": 1}, {"max_staleness": 3, "partial_tokens": 16}])
def test_what_lost_engines_had_is_sampled_by_others_and_they_come_back(tmp_path: Path, ahead: Json) -> None:
    slow = profile(engine={"step_s": 6.0, "layer_s": 0.0, "response_s": 0.01})  # about the trainer's time
    chosen, seconds = seconds_of(engines=4, restarts=1000, device=slow, **ahead)
    chosen = chosen.model_copy(update={"run": chosen.run.model_copy(update={"steps": 40})})
    step = seconds.way.step_s
    steps = steps_of(tmp_path / "run", chosen, seconds, engine_mtbf_s=4 * step, engine_restart_s=step)
    assert len(steps) == 40
    assert all(line["rollout/response_tokens_mean"] == 64 for line in steps)
    last = steps[-1]
    assert last["engines/returned"] > 3 and last["engines/requests_resent"] > 3
    assert min(line["engines/live"] for line in steps) < 4
    assert max(line["time/step_s"] for line in steps) > 1.1 * step


def test_too_few_engines_end_a_simulated_run_as_a_real_one(tmp_path: Path) -> None:
    chosen, seconds = seconds_of(restarts=0, minimum_engines=2)
    with pytest.raises(RapoError, match=r"ends after .* s, as too few engines are left: [01] of 2"):
        steps_of(tmp_path / "run", chosen, seconds, engine_mtbf_s=seconds.way.step_s)


def test_dynamic_sampling_draws_again_by_recorded_rewards(tmp_path: Path) -> None:
    """Every second group teaches: about twice as many are drawn as are trained on."""
    rewards = [np.ones(8), np.array([0.0, 1.0] * 4)]
    lengths = Lengths([np.full(8, 10), np.full(8, 30)], rewards, "a test")
    chosen, seconds = seconds_of(dynamic_sampling={})
    steps = steps_of(tmp_path / "run", chosen, seconds, lengths)
    assert all(line["sampling/rounds"] >= 1 for line in steps)
    assert np.mean([line["sampling/prompts_drawn"] for line in steps]) > 12
    assert np.mean([line["rollout/response_tokens_mean"] for line in steps]) > 27  # those that teach
    with pytest.raises(RapoError, match=r"dynamic_sampling draws again by rewards.*--lengths RUN"):
        steps_of(tmp_path / "other", chosen, seconds)


def test_exponential_lengths_have_the_mean_of_the_plan() -> None:
    lengths = exponential(replace(LOAD, response_tokens=300))
    assert lengths.mean == pytest.approx(300, rel=5e-3)
    assert max(lengths.groups[0]) == 1000
    drawn, rewards = lengths.draw(np.random.default_rng(0), [4, 2], 500)
    assert rewards is None and list(map(len, drawn)) == [4, 2]
    assert max(map(max, drawn)) <= 500


def test_recorded_groups_are_drawn_whole() -> None:
    lengths = Lengths([np.array([1, 2, 3]), np.array([70, 80, 90])], None, "a test")
    drawn, _ = lengths.draw(np.random.default_rng(0), [3] * 20, 85)
    assert {tuple(sorted(group)) for group in drawn} == {(1, 2, 3), (70, 80, 85)}
    larger, _ = lengths.draw(np.random.default_rng(0), [8], 85)
    assert set(larger[0]) <= {1, 2, 3} or set(larger[0]) <= {70, 80, 85}


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "has no length"), ("12 zwölf", "cannot be read"), ("3\n0\n", "has 0, and a response")],
)
def test_lengths_that_are_none_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "lengths").write_text(text)
    with pytest.raises(RapoError, match=message):
        read_lengths(tmp_path / "lengths")
    (tmp_path / "run").mkdir()
    with pytest.raises(RapoError, match="has no recorded samples"):
        read_lengths(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stragglers": 1.5}, "--stragglers 1.5"),
        ({"straggler_factor": 1.0}, "--straggler-factor 1"),
        ({"engine_mtbf_s": 0.0}, "--engine-mtbf 0"),
        ({"engine_restart_s": -1.0}, "--engine-restart -1"),
        ({"stragglers": math.nan}, "--stragglers nan"),
    ],
)
def test_conditions_that_cannot_be_are_refused(options: Json, message: str) -> None:
    with pytest.raises(RapoError, match=message):
        Conditions(**options)


PLAN = ["plan", str(EXAMPLE), "--gpus", "16", "--profile", "h200", "--prompt-tokens", "200", "--show", "1"]
SHORT = ["--response-tokens", "500", "--set", "run.steps=3", "checkpoint.every=3", "evaluate.every=3"]
SHORT += ["rollout.prompts_per_step=64", "algorithm.minibatch_prompts=64"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "1"], "--seed 1 has no effect without --simulate"),
        (
            ["--simulate", "S", "--engine-restart", "9"],
            "--engine-restart 9.0 has no effect without --engine-mtbf",
        ),
        (["--simulate", "S", "--straggler-factor", "9"], "has no effect without --stragglers"),
        (
            ["--simulate", "S", "--lengths", "L", "--response-tokens", "9"],
            "--response-tokens 9 has no effect",
        ),
        (["--simulate", "."], "--simulate . has something in it"),
        (["--as-configured"], "as configured, the run has 16 trainer ranks and 2 engines of 1.*--gpus 18"),
        (["--as-configured", "--output", "o"], "--output would write what is configured"),
    ],
)
def test_options_without_effect_are_refused(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(EXAMPLE.parents[2])
    assert main([*PLAN, *options]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_simulated_run_is_traced_and_reported_and_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(EXAMPLE.parents[2])
    run = tmp_path / "imagined"
    assert main([*PLAN, *SHORT, "--simulate", str(run), "--stragglers", "0.1", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "simulated in" in printed and "3 steps of 16 devices" in printed and "exponential" in printed
    marked = json.loads((run / "simulated.json").read_text())
    assert marked["conditions"]["stragglers"] == 0.1 and marked["conditions"]["seed"] == 3
    assert main(["trace", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "was simulated, and never ran" in printed and "busy" in printed
    events = json.loads((run / "timeline/trace.json").read_text())["traceEvents"]
    names = {event["args"].get("name") for event in events if event["ph"] == "M"}
    assert {"trainer (simulated)", "engines (simulated)"} <= names
    assert {"rollout", "annotate", "update", "publish"} <= {event["name"] for event in events}
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "Report of simulated runs" in printed and "it never ran, and learnt nothing" in printed
    page = (run / "report/report.html").read_text()
    assert "imagined (simulated)" in page and "Report of simulated runs" in page
    trained = load_config([EXAMPLE], [f"run.directory={run}"])
    with pytest.raises(RapoError, match=r"holds a simulated run.*choose another run.directory"):
        check_standing(trained)


def test_a_run_corrects_the_plan_by_what_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated run whose parts took other times than planned stands for a real one."""
    monkeypatch.chdir(EXAMPLE.parents[2])
    known = Correction(1.7, Corrected(2.5), Corrected(0.5), Corrected(more_s=3.0), other_s=4.0)
    device = profile(engine={"step_s": 0.1, "layer_s": 0.0, "response_s": 0.01}, step_s=1.0)
    chosen, seconds = seconds_of(device=device, correction=known)
    assert seconds.way.publish_s == pytest.approx(0.0)
    model = chosen.model.model_copy(update={"config": Path("examples/configs/qwen2.5-7b.config.json")})
    chosen = chosen.model_copy(update={"model": model})
    lengths = exponential(seconds.planner.workload)
    simulate(chosen, seconds, lengths, Conditions(), tmp_path / "run")
    with pytest.raises(RapoError, match=r"holds a simulated run.*name a run that ran"):
        corrected_by(tmp_path / "run", device)
    (tmp_path / "run/simulated.json").unlink()
    found = corrected_by(tmp_path / "run", device)
    assert found.engines == pytest.approx(1.7, rel=0.02)
    assert found.annotate.times == pytest.approx(2.5, rel=0.02)
    assert found.update.times == pytest.approx(0.5, rel=0.02)
    assert found.publish.of(0.0) == pytest.approx(3.0)
    assert found.other_s == pytest.approx(4.0, rel=1e-3)
    with pytest.raises(RapoError, match="rates of float32; name a run of that type"):
        corrected_by(tmp_path / "run", device.model_copy(update={"dtype": "float32"}))


def test_requests_that_find_no_room_wait_for_an_answer(tmp_path: Path) -> None:
    """8 requests for 2 engines that may have one each: four rounds, of 8 responses."""
    chosen, seconds = seconds_of(requests_per_engine=1, prompts_per_request=1)
    steps = steps_of(tmp_path / "run", chosen, seconds)
    rates = seconds.rates
    each = 64 * rates.decode_s(8, 16 + 32) + rates.prefill_s(1, 16)
    assert steps[2]["time/sampling_s"] == pytest.approx(4 * each, rel=2e-3)
