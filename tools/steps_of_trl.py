"""TRL's GRPO on what `bench_step.py` gives, in an environment of TRL's own: a line of JSON for each step.

python tools/steps_of_trl.py WORKLOAD.json
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Timed(GRPOTrainer):
    """With the seconds of a step by phase."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seconds: dict[str, float] = {}

    def _generate(self, *args: Any, **options: Any) -> Any:
        return self._timed("rollout", super()._generate, *args, **options)

    def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
        ask = super()._get_per_token_logps_and_entropies
        if torch.is_grad_enabled():
            return ask(*args, **options)
        return self._timed("annotate", ask, *args, **options)

    def _timed(self, phase: str, function: Any, *args: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        result = function(*args, **options)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begun
        return result


class Told(TrainerCallback):
    """Prints each step's seconds; what is neither rollout nor annotation is the update."""

    trainer: Timed

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.perf_counter()
        self.trainer.seconds.clear()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        step, parts = time.perf_counter() - self.begun, self.trainer.seconds
        told = {"step_s": step, "rollout_s": parts["rollout"], "annotate_s": parts.get("annotate", 0.0)}
        print(json.dumps({**told, "update_s": step - sum(parts.values())}), flush=True)


def main() -> None:
    """Trains for the workload's steps."""
    given = json.loads(Path(sys.argv[1]).read_text())
    responses = given["prompts"] * given["responses"]
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    tokenizer.pad_token = tokenizer.eos_token
    config = GRPOConfig(
        output_dir=str(Path(sys.argv[1]).with_suffix("")),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=given["steps"],
        per_device_train_batch_size=given["microbatch_responses"],
        gradient_accumulation_steps=responses // given["microbatch_responses"],
        num_generations=given["responses"],
        max_completion_length=given["tokens"],
        temperature=1.0,
        beta=given["coefficient"],
        learning_rate=1e-6,
        logging_steps=10**9,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    told = Told()
    trainer = Timed(
        model=given["model"],
        reward_funcs=lambda completions, **_: [float(zlib.crc32(one.encode()) % 2) for one in completions],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": question} for question in given["questions"]]),
        processing_class=tokenizer,
        callbacks=[told],
    )
    told.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    main()
