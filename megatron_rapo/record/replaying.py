"""Whether a run may train on what another one has recorded."""

from __future__ import annotations

import json

from megatron_rapo.config import RunConfig
from megatron_rapo.config.resuming import changes, options_of
from megatron_rapo.errors import RapoError
from megatron_rapo.record.configurations import read_configurations
from megatron_rapo.record.identity import Identity
from megatron_rapo.samples.store import steps_of

# What prompts are drawn, and what a recorded log-prob means.
_SAME = (
    *("run.seed", "data.shuffle", "rollout.prompts_per_step", "rollout.responses_per_prompt"),
    *("rollout.temperature", "rollout.dynamic_sampling.over_sampling"),
    "rollout.dynamic_sampling.max_rounds",
)
_CONTENTS = ("tokenizer or chat template of model.path", "weights or shuffling of data.sources")


def check_recorded(config: RunConfig) -> None:
    """Refuses to replay a run that has not recorded what this one is to train on.

    Raises:
        RapoError: there is no such run, it lacks steps, or had other options of what is sampled.
    """
    recorded = config.rollout.replay
    if recorded is None:
        return
    option = f"rollout.replay = {recorded}"
    if recorded.resolve() == config.run.directory.resolve():
        raise RapoError(f"{option} is run.directory itself; choose another run.directory")
    configurations = read_configurations(recorded) if recorded.is_dir() else []
    if not configurations:
        raise RapoError(f"{option} is no run (it has no configurations.jsonl); give the directory of one")
    files = steps_of(recorded)
    missing = [step for step in range(1, config.run.steps + 1) if step not in files]
    if missing:
        raise RapoError(
            f"{option} has no samples of step {missing[0]}; run.steps = {config.run.steps} needs those of "
            f"each step: set {missing[0] - 1}, or record them (observe.samples_every = 1)"
            if missing[0] > 1
            else f"{option} has no samples of step 1; record them (observe.samples_every = 1)"
        )
    now = json.loads(json.dumps(options_of(config)))
    differing = changes(configurations[-1].options, now)
    for name in _SAME:
        if name in differing:
            before, value = differing[name]
            raise RapoError(f"{option} was recorded with {name} = {before}, now {value}; give the same")


def check_recorded_identity(config: RunConfig, now: Identity) -> None:
    """Refuses to replay a run of other prompts, or of another tokenizer.

    Raises:
        RapoError: it names what differs.
    """
    recorded = config.rollout.replay
    if recorded is None:
        return
    before = Identity.read(recorded)
    if before is None:
        raise RapoError(f"rollout.replay = {recorded} has no identity.json; give the directory of a run")
    contents = {name: value for name, value in before.contents.items() if name in _CONTENTS}
    if found := Identity(contents, {}, before.prompts).differences(now):
        raise RapoError(
            f"rollout.replay = {recorded} was recorded with {', '.join(found)}; give the data and the "
            "tokenizer that it was recorded with"
        )
