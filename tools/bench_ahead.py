"""What sampling ahead saves: whole runs with `rollout.max_staleness` 0, 1 and 2, and with partial responses.

    python tools/bench_ahead.py                              # engines and trainer take about the same
    python tools/bench_ahead.py --tokens 4 --json result.json    # rollouts are negligible
    python tools/bench_ahead.py --tail 0.05                  # 1 of 20 responses is 4 times as long

Real runs of `megatron-rapo train`, one after the other in each round: a trainer of one rank and one thread
beside an embedded server of one thread, so two cores. Responses have given lengths, whatever the (random)
model says. `partial` lets a version of the weights sample as many tokens of a response as most have, and
has as many versions as the longest need; without a tail, half of them. A step's seconds are its median
after the first five; told are medians over rounds, and beside them what the closing summary of the run that
does not sample ahead said would be saved.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 4096  # so many that the random model hardly ever ends a response by itself
WARM_UP = 5  # steps; and batches that no weights were newer for
TIMES_LONGER = 4  # the tail's responses
MODES = ("0", "1", "2", "partial")
ENVIRONMENT = '''
"""Problems without a question, and responses of given lengths."""

import random

from megatron_rapo import Episode, Score, Transcript


def problems(split, seed, count=None):
    for number in range(1000):
        yield {"question": str(number + 1000), "answer": 0}


class GivenLengths:
    async def run(self, problem, generate, seed):
        draw = random.Random(seed)
        tokens = TOKENS * (TIMES_LONGER if draw.random() < TAIL else 1)
        transcript = Transcript(problem.token_ids)
        turn = 0
        while (left := tokens - (len(transcript.token_ids) - len(problem.token_ids))) > 0:
            transcript.add_turn(await generate(transcript.token_ids, turn=turn, max_tokens=left))
            turn += 1
        return Episode((transcript.sequence(),), answer="", score=Score(draw.random()))
'''
CONFIG = """
[run]
directory = "{directory}"
steps = {steps}
[model]
path = "model"
dtype = "float32"
[data]
source = "function"
problems = "given_lengths:problems"
template = "plain"
template_text = "{{prompt}}"
[environment]
use = "given_lengths:GivenLengths"
max_turns = 64
[rollout]
prompts_per_step = {prompts}
responses_per_prompt = 8
max_prompt_tokens = 16
max_response_tokens = {longest}
{ahead}
[rollout.engine]
kind = "embedded"
[algorithm]
method = "grpo"
[checkpoint]
every_minutes = 0
[observe]
samples_every = 0
"""


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=2, help="of a step, with 8 responses each")
    parser.add_argument("--tokens", type=int, default=96, help="of most responses")
    parser.add_argument("--tail", type=float, default=0.0, help="share of responses that are 4 times as long")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", options.hidden, options.layers)
        given = {"TOKENS": options.tokens, "TAIL": options.tail, "TIMES_LONGER": TIMES_LONGER}
        text = "\n".join([*(f"{key} = {value}" for key, value in given.items()), ENVIRONMENT])
        (folder / "given_lengths.py").write_text(text)
        found = measure(folder, options)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options), "modes": found}, default=str, indent=1))


def make_model(directory: Path, hidden: int, layers: int) -> None:
    """A random Qwen2 with a tokenizer of digits."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    digits_tokenizer(VOCABULARY).save_pretrained(directory)


def digits_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Of digits, and names that no text has for all other tokens."""
    names = ["<unknown>", "<end>", *"0123456789"]
    names += [f"<{number}>" for number in range(len(names), vocabulary)]
    characters = Tokenizer(BPE({name: number for number, name in enumerate(names)}, [], unk_token=names[0]))
    return PreTrainedTokenizerFast(tokenizer_object=characters, eos_token=names[1], unk_token=names[0])


def measure(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of each mode, the medians over rounds."""
    rounds: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for number in range(options.rounds):
        for mode in MODES:
            rounds[mode].append(run(folder, options, mode, f"run-{number}-{mode}"))
            print(f"round {number}, {mode}: {rounds[mode][-1]}", file=sys.stderr, flush=True)
    found = {
        mode: {key: statistics.median(one[key] for one in runs) for key in runs[0] if key != "told"}
        for mode, runs in rounds.items()
    }
    for mode, runs in rounds.items():
        found[mode]["told"] = runs[-1]["told"]
        each = zip(rounds[MODES[0]], runs, strict=True)
        found[mode]["speed"] = statistics.median(base["step_s"] / one["step_s"] for base, one in each)
    return found


def staleness(mode: str, options: argparse.Namespace) -> str:
    """The options of a mode."""
    if mode != "partial":
        return f"max_staleness = {mode}"
    versions, tokens = (TIMES_LONGER, options.tokens) if options.tail else (2, -(-options.tokens // 2))
    return f"max_staleness = {versions}\npartial_tokens = {tokens}"


def run(folder: Path, options: argparse.Namespace, mode: str, name: str) -> dict[str, Any]:
    """One run: medians over its steps, in seconds, and what its summary says of engines."""
    longest = options.tokens * (TIMES_LONGER if options.tail else 1)
    text = CONFIG.format(
        directory=name,
        steps=options.steps,
        prompts=options.prompts,
        longest=longest,
        ahead=staleness(mode, options),
    )
    (folder / f"{name}.toml").write_text(text)
    command = [str(Path(sys.executable).with_name("megatron-rapo")), "train", f"{name}.toml"]
    ended = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    if ended.returncode:
        raise SystemExit(f"{name} failed:\n{ended.stdout}\n{ended.stderr}")
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"] > WARM_UP and "time/sampling_s" in line]
    told = [line for line in ended.stdout.splitlines() if line.startswith("engines sampled")]

    def median(*names: str) -> float:
        return statistics.median(sum(line.get(f"time/{name}_s", 0.0) for name in names) for line in steps)

    return {
        "step_s": median("step"),
        "sampling_s": median("sampling"),
        "waited_s": median("rollout"),
        "trainer_s": median("annotate", "update"),
        "publish_s": median("publish"),
        "told": told[0] if told else "",
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """For people."""
    columns = ("step_s", "sampling_s", "waited_s", "trainer_s", "publish_s")
    lines = [f"{'max_staleness':14}" + "".join(f"{column:>12}" for column in columns) + f"{'speed':>9}"]
    for mode, one in found.items():
        cells = "".join(f"{one[column]:12.3f}" for column in columns)
        lines.append(f"{mode:<14}{cells}{one['speed']:8.2f}×")
    return "\n".join([*lines, *(f"{mode}: {one['told']}" for mode, one in found.items() if one["told"])])


if __name__ == "__main__":
    main()
