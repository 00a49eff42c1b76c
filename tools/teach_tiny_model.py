"""Teaches the tiny base model to try again, or to have sums calculated: bases for turns and tools.

    python tools/teach_tiny_model.py retries --output runs/base-retries
    python tools/teach_tiny_model.py calls --output runs/base-calls

`retries` has seen questions that come again after guesses that failed; `calls` arithmetic, of which it does
little by calls (`examples/tools`). A minute or two on one core; the same seed on the same machine gives the
same bits.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from make_tiny_model import MULTIPLYING, TASK, save
from tiny_model.demonstrations import Demonstrations
from tiny_model.training import Recipe, Source, train
from tiny_model.turns import Calls, Retries
from transformers import AutoTokenizer, Qwen2ForCausalLM

from megatron_rapo.config import ArithmeticData

BASE = Path(__file__).parents[1] / "examples/models/tiny-countdown"
SUMS = ArithmeticData(source="arithmetic", terms=2, digits=3, operators="+-*", problems=100_000)
RECIPES = {
    "retries": Recipe(skill_steps=0, habit_steps=250, habit_share=0.15, learning_rate=1e-3),
    "calls": Recipe(skill_steps=300, skill_share=0.5, habit_steps=60, habit_share=0.05, learning_rate=3e-3),
}


def main() -> None:
    """Trains and saves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=RECIPES)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=1, help="of demonstrations (1)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one thread sums in one order: the same bits every time
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = Qwen2ForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    demonstrations: Source = (
        Calls.of(SUMS, arguments.seed)
        if arguments.what == "calls"
        else Retries(Demonstrations(TASK.numbers, TASK.largest, MULTIPLYING))
    )
    start = time.monotonic()
    recipe = RECIPES[arguments.what]
    for step, loss in enumerate(train(model, tokenizer, demonstrations, recipe, arguments.seed)):
        if step % 100 == 0 or step == recipe.steps - 1:
            print(f"step {step:4d}  loss {loss:.3f}  {time.monotonic() - start:.0f} s", flush=True)
    save(model.to(torch.bfloat16), tokenizer, arguments.output)


if __name__ == "__main__":
    main()
