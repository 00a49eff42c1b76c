"""What verifying and storing cost beside the engines: tokens a second with and without them.

    python tools/bench_evaluation.py MODEL [--samples 256]

Starts an embedded server with the model, and samples generated Countdown problems twice: once responses are
thrown away, once they go through `Sampler.draw`, as in `megatron-rapo evaluate`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from megatron_rapo.config import validate
from megatron_rapo.data.tokenizer import load_tokenizer
from megatron_rapo.evaluate.held_out import load_held_out, setting_records
from megatron_rapo.evaluate.plan import plan
from megatron_rapo.evaluate.sampler import Sampler
from megatron_rapo.evaluate.store import SampleStore
from megatron_rapo.experience.engines import open_own_engines
from megatron_rapo.model.architecture import read_architecture
from megatron_rapo.reward.verifier import Verifier


def main() -> None:
    """Prints both speeds and the overhead."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="HF directory")
    parser.add_argument("--samples", type=int, default=256, help="a problem")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--max-response-tokens", type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        config = validate(
            {
                "run": {"directory": scratch, "steps": 1},
                "model": {"path": str(arguments.model), "dtype": "float32"},
                "data": {"source": "countdown", "numbers": 3},
                "rollout": {"prompts_per_step": 1, "max_response_tokens": arguments.max_response_tokens},
                "algorithm": {"max_tokens_per_microbatch": 2**30},
                "evaluate": {"problems": arguments.problems, "samples": arguments.samples, "k": [1]},
            },
            "bench_evaluation",
        )
        tokenizer = load_tokenizer(arguments.model)
        [held_out], [setting] = load_held_out(config, tokenizer), setting_records(config)
        store = SampleStore(Path(scratch) / "samples", held_out.problems)
        batches = list(plan(held_out.prompts, arguments.samples, frozenset(), rows=1024))
        with (
            open_own_engines(config, read_architecture(arguments.model)) as pool,
            Verifier(held_out.verifier, workers=2, time_limit_s=5.0) as verifier,
        ):
            pool.update_weights(arguments.model, 0)
            sampler = Sampler(pool, tokenizer, weight_version=0, seed=1)
            for _ in sampler.generated(batches[:1], setting):
                pass  # what starts up at the first request
            start, tokens = time.perf_counter(), 0
            for _, groups in sampler.generated(batches, setting):
                tokens += sum(len(response.token_ids) for group in groups for response in group.responses)
            alone = time.perf_counter() - start
            start = time.perf_counter()
            for _ in sampler.draw(batches, setting, verifier, store):
                pass
            whole = time.perf_counter() - start
        print(f"engines alone {tokens / alone:,.0f} tokens/s, evaluation {tokens / whole:,.0f} tokens/s")
        print(f"overhead {whole / alone - 1:.1%}")


if __name__ == "__main__":
    main()
