"""Makes the tiny base model of `examples/models/tiny-countdown`, on one CPU core, in minutes.

    python tools/make_tiny_model.py --output examples/models/tiny-countdown

It is a Qwen2 of 0.6M parameters with a character tokenizer, for trying RL where no GPU is at hand. It can
work Countdown problems out but seldom bothers to (most of what it saw at last are quick guesses), so that
pass@1 starts low and RL has something to find; and it hardly ever multiplies, so that pass@64 has a
ceiling; `--guesses-multiplying` lifts that, and what it then solves by guesses alone is what RL may lose.
`--habits-of MODEL` teaches a model that was made before other guesses, and nothing else, in a minute or two;
with `--experts N` it becomes a Qwen2-MoE first, whose N experts in a layer then grow apart:

    python tools/make_tiny_model.py --experts 4 --habits-of examples/models/tiny-countdown --output experts

The same seed on the same machine gives the same bits.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from tiny_model.demonstrations import Demonstrations
from tiny_model.experts import upcycle
from tiny_model.measuring import count_correct
from tiny_model.tokenizer import build_tokenizer
from tiny_model.training import Recipe, build_model, train
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from megatron_rapo.config import CountdownData
from megatron_rapo.data.tasks import countdown
from megatron_rapo.evaluation.interval import estimate
from megatron_rapo.evaluation.pass_at_k import pass_at_k

TASK = CountdownData(source="countdown", numbers=3, largest=25, operators="+-*")
MULTIPLYING = 0.002  # share of × among the demonstrations' operators; a third in the task's own

PROBLEMS, SAMPLES = 128, 64
TEST_SEED = 1


def main() -> None:
    """Trains, measures and saves."""
    arguments = _parse_arguments()
    torch.set_num_threads(1)  # one thread sums in one order: the same bits every time
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    known = arguments.habits_of
    model = build_model(tokenizer) if known is None else Qwen2ForCausalLM.from_pretrained(known).float()
    if arguments.experts is not None:
        model = upcycle(model, arguments.experts)
    demonstrations = Demonstrations(TASK.numbers, TASK.largest, MULTIPLYING, arguments.guesses_multiplying)
    recipe = Recipe()
    start = time.monotonic()
    first = 0 if known is None else recipe.skill_steps
    losses = train(model, tokenizer, demonstrations, recipe, arguments.seed, first)
    for step, loss in enumerate(losses, first):
        if step % 100 == 0 or step == recipe.steps - 1:
            print(f"step {step:4d}  loss {loss:.3f}  {time.monotonic() - start:.0f} s", flush=True)
    model = model.to(torch.bfloat16)
    save(model, tokenizer, arguments.output)
    report(model, tokenizer)


def save(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, output: Path) -> None:
    """Writes an HF model directory: configuration, bf16 safetensors, tokenizer."""
    model.generation_config.update(do_sample=True, temperature=1.0)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def report(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> None:
    """Prints pass@k on test problems, from bf16 weights as they were saved, computed in fp32."""
    problems = countdown.generate(TASK, TEST_SEED, "test", PROBLEMS)
    counts = count_correct(model.float(), tokenizer, problems, SAMPLES)
    print(f"{PROBLEMS} test problems, {SAMPLES} samples each; 95% intervals over problems")
    for k in (1, 4, 16, 64):
        found = estimate(pass_at_k(counts, SAMPLES, k))
        print(f"pass@{k:<2d} {found.mean:.3f}  [{found.low:.3f}, {found.high:.3f}]")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=1, help="of initialisation and demonstrations (1)")
    parser.add_argument(
        "--guesses-multiplying",
        type=float,
        metavar="SHARE",
        help=f"of the operators of quick guesses that are ×; default: {MULTIPLYING}, as of worked solutions",
    )
    parser.add_argument(
        "--habits-of",
        type=Path,
        metavar="MODEL",
        help="a model of this tool that only learns to guess anew; default: one is trained from scratch",
    )
    parser.add_argument(
        "--experts", type=int, metavar="N", help="of a layer, made of each MLP of --habits-of"
    )
    arguments = parser.parse_args()
    if arguments.experts is not None and arguments.habits_of is None:
        parser.error("--experts is made of a model with skills: name one with --habits-of")
    return arguments


if __name__ == "__main__":
    main()
