"""What verifying and storing cost beside the engines: seconds of sampling with and without them.

    python tools/bench_evaluation.py                     # a random model of 25M parameters
    python tools/bench_evaluation.py --hidden 64 --layers 2 --samples 256

Starts an embedded server with the demo's model, made wider and deeper, and samples generated Countdown
problems in turn: once responses are thrown away, once they go through `Sampler.draw`, as in
`megatron-rapo evaluate`. Medians of rounds after a first one.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rapo.config import validate
from megatron_rapo.data.tokenizer import load_tokenizer
from megatron_rapo.environments.runner import Runner
from megatron_rapo.environments.running import EpisodeRunner
from megatron_rapo.environments.single_turn import SingleTurn
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.evaluation.held_out import load_held_out, setting_records
from megatron_rapo.evaluation.plan import plan
from megatron_rapo.evaluation.sampler import Sampler
from megatron_rapo.evaluation.store import SampleStore
from megatron_rapo.experience.engines import open_own_engines
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.reward.verifier import Verifier

DEMO = Path(__file__).parents[1] / "examples/models/tiny-countdown"
ROUNDS = 3


def main() -> None:
    """Prints both speeds and the overhead."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--samples", type=int, default=16, help="a problem")
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--max-response-tokens", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch) / "model", arguments.hidden, arguments.layers)
        config = validate(
            {
                "run": {"directory": scratch, "steps": 1},
                "model": {"path": str(model), "dtype": "float32"},
                "data": {"source": "countdown", "numbers": 3},
                "rollout": {"prompts_per_step": 1, "max_response_tokens": arguments.max_response_tokens},
                "algorithm": {"max_tokens_per_microbatch": 2**30},
                "evaluate": {"problems": arguments.problems, "samples": arguments.samples, "k": [1]},
            },
            "bench_evaluation",
        )
        tokenizer = load_tokenizer(model)
        [held_out], [setting] = load_held_out(config, tokenizer), setting_records(config)
        store = SampleStore(Path(scratch) / "samples", held_out.problems)
        batches = list(plan(held_out.prompts, arguments.samples, frozenset(), rows=64))
        with (
            open_own_engines(config, read_architecture(model)) as pool,
            Verifier(held_out.plan, workers=2, time_limit_s=5.0) as verifier,
            ExitStack() as stack,
        ):
            pool.update_weights(model, 0)
            episodes = EpisodeRunner(
                SingleTurn(), config.environment, tokenizer, 1.0, read_architecture(model).vocabulary
            )
            sampler = Sampler(stack.enter_context(Runner(episodes, pool)), pool, weight_version=0, seed=1)
            times: dict[str, list[float]] = {"alone": [], "whole": []}
            for _ in range(ROUNDS + 1):
                start, tokens = time.perf_counter(), 0
                for _, groups in sampler.generated(batches, setting, unjudged):
                    tokens += sum(one.episode.sampled_tokens for group in groups for one in group.episodes)
                times["alone"].append(time.perf_counter() - start)
                start = time.perf_counter()
                for _ in sampler.draw(batches, setting, verifier.score, store):
                    pass
                times["whole"].append(time.perf_counter() - start)
        alone, whole = (statistics.median(seconds[1:]) for seconds in times.values())
        responses = arguments.problems * arguments.samples
        print(f"{responses} responses, {tokens:,} tokens, medians of {ROUNDS}")
        speed = f"{tokens / alone:,.0f} tokens/s, {responses / alone:,.0f} responses/s"
        print(f"engines alone {alone:.2f} s ({speed})")
        print(f"evaluation {whole:.2f} s: {whole / alone - 1:+.1%}")


async def unjudged(response: str, problem: Problem) -> Verification:
    """For engines alone."""
    return Verification(Outcome.WRONG)


def make_model(directory: Path, hidden: int, layers: int) -> Path:
    """A random model of this size with the demo's vocabulary and tokenizer."""
    shutil.copytree(DEMO, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(DEMO)
    config.update({"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers})
    config.layer_types = ["full_attention"] * layers
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


if __name__ == "__main__":
    main()
