"""Times annotate and update of each method against GRPO's, on the same samples, in one process.

    python tools/bench_methods.py                          # all methods that learn from samples
    python tools/bench_methods.py --methods bapo copg --rounds 9 --json result.json

A step of `--prompts` problems with 8 responses each and two minibatches, on a small Qwen2 with random
weights. In each round every method annotates (the policy's old log-probs, the reference), weighs, and makes
both updates; what is told is the median over rounds of a method's processor time divided by GRPO's in the
same round, and by that of GRPO without the reference that it needs (`divergence_coefficient = 0`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_rapo.config import Parallel, RunConfig, validate
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.launch.local import run_local
from megatron_rapo.loss.objective import Objective
from megatron_rapo.methods.named import METHODS
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement, process_groups
from megatron_rapo.policy.batch import build_minibatches, make_samples, plan_minibatches
from megatron_rapo.policy.beside import open_frozen
from megatron_rapo.policy.policy import Policy
from megatron_rapo.policy.weighing import weigh

VOCABULARY, PROMPT_TOKENS = 512, 16
PLAIN = "grpo, no divergence"


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, help="default: all that need no more than samples"
    )
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96, help="of a response, on average")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = options.methods or [name for name, kind in METHODS.items() if not unusual(name, kind)]
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        report = Path(folder) / "report.json"
        run_local(measure, (Path(folder), names, options.prompts, options.tokens, options.rounds, report), 1)
        found = json.loads(report.read_text())
    print(f"{'method':<20}  {'ms':>8}  {'× grpo':>7}  {'× grpo without reference':>7}")
    for name, (seconds, ratio, plain) in found.items():
        print(f"{name:<20}  {1e3 * seconds:8.1f}  {ratio:7.2f}  {plain:7.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


def unusual(name: str, kind: Any) -> bool:
    """Whether a method learns from more than samples: given texts, a teacher, further episodes."""
    method = kind(kind.Options.model_validate({"method": name, **kind.example}), _sampling())
    return bool(method.asks or method.wants_teacher or name == "sft")


def _sampling() -> Any:
    from megatron_rapo.methods.sampling import Sampling

    return Sampling(1.0, 8, 64)


def write_model(path: Path) -> None:
    """A random Qwen2."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)


def configuration(folder: Path, prompts: int, tokens: int, **algorithm: Any) -> RunConfig:
    """Of one method's run."""
    return validate(
        {
            "run": {"directory": str(folder / "run"), "steps": 1},
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "data": {"source": "arithmetic"},
            "rollout": {
                "prompts_per_step": prompts,
                "responses_per_prompt": 8,
                "max_prompt_tokens": PROMPT_TOKENS,
                "max_response_tokens": 2 * tokens,
            },
            "algorithm": {"minibatch_prompts": prompts // 2, **algorithm},
        },
        source="of the benchmark",
    )


def measure(folder: Path, names: Sequence[str], prompts: int, tokens: int, rounds: int, report: Path) -> None:
    """In the one rank."""
    settings: dict[str, dict[str, Any]] = {
        "grpo": {"method": "grpo"},
        PLAIN: {"method": "grpo", "divergence_coefficient": 0.0},
        **{name: {"method": name, **METHODS[name].example} for name in names if name != "grpo"},
    }
    with process_groups(Parallel(), seed=1) as placement:
        steps = {
            name: a_step(configuration(folder, prompts, tokens, **own), placement)
            for name, own in settings.items()
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(rounds + 1):
            for name, step in steps.items():
                began = time.process_time()
                step()
                if number:  # the first warms up
                    times[name].append(time.process_time() - began)
    found = {}
    for name, own in times.items():
        ratios = [
            statistics.median(one / other for one, other in zip(own, times[base], strict=True))
            for base in ("grpo", PLAIN)
        ]
        found[name] = [statistics.median(own), *ratios]
    report.write_text(json.dumps(found))


def a_step(config: RunConfig, placement: Placement) -> Callable[[], None]:
    """What annotates and updates once, from samples that are made before."""
    architecture, method = read_architecture(config.model.path), config.new_method()
    policy = Policy(config.model, config.optimizer, architecture, placement, total_updates=100)
    frozen = open_frozen(config, architecture, method, placement, policy.chunks)
    objective = Objective(method, temperature=1.0, vocabulary=VOCABULARY, group=placement.tensor_group)
    groups = made_up(config, method)

    def step() -> None:
        samples = make_samples(groups, method, VOCABULARY, config.minibatch_prompts)
        plans = plan_minibatches(samples, config)
        minibatches = build_minibatches(samples, plans, config, placement)
        policy.annotate(minibatches, objective)
        for one in frozen:
            one.annotate(minibatches, objective)
        weigh(minibatches, method, placement)
        method.learn(policy.update(minibatches, objective, frozen[-1] if frozen else None))

    return step


def made_up(config: RunConfig, method: Any) -> list[Group]:
    """Groups of random tokens, with what the method reads of them."""
    random = np.random.default_rng(0)
    mean = config.rollout.max_response_tokens // 2

    def episode(number: int) -> ScoredEpisode:
        tokens = int(random.integers(mean // 2, mean + mean // 2))
        sequence = TokenSequence.of_response(
            random.integers(0, VOCABULARY, PROMPT_TOKENS).tolist(),
            random.integers(0, VOCABULARY, tokens).astype(np.int32),
            random.normal(-np.log(VOCABULARY), 0.3, tokens).astype(np.float32),
            version=0,
        )
        right = bool(random.random() < 0.4)
        verification = Verification(
            Outcome.CORRECT if right else Outcome.WRONG,
            str(number % 3),
            facts=dict.fromkeys(method.facts, float(number % 4)),
        )
        return ScoredEpisode(Episode((sequence,), ""), verification)

    columns = dict.fromkeys(method.columns, 0.5)
    return [
        Group(Problem(str(place), "", columns=columns), tuple(map(episode, range(8))))
        for place in range(config.rollout.prompts_per_step)
    ]


if __name__ == "__main__":
    main()
