"""The shipped base model, and the tool that makes it."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rapo.config import ArithmeticData, CountdownData, load_config
from megatron_rapo.data.tasks import arithmetic, countdown
from megatron_rapo.data.tasks.problem import split_of
from megatron_rapo.evaluation.pass_at_k import pass_at_k
from megatron_rapo.tools.calculator import calculator

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "models" / "tiny-countdown"

sys.path.insert(0, str(ROOT / "tools"))  # the tool is a script beside the package, not a part of it
import make_tiny_model  # noqa: E402
from tiny_model.demonstrations import Demonstration, Demonstrations  # noqa: E402
from tiny_model.experts import upcycle  # noqa: E402
from tiny_model.measuring import count_correct  # noqa: E402
from tiny_model.tokenizer import build_tokenizer  # noqa: E402
from tiny_model.training import Recipe, build_model, collate, train  # noqa: E402
from tiny_model.turns import Calls, Retries  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_shipped_weights_are_small_bf16_and_finite():
    path = SHIPPED / "model.safetensors"
    assert path.stat().st_size < 3_000_000
    tensors = load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_shipped_shapes_divide_over_tensor_and_virtual_pipeline_ranks():
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    assert config["tie_word_embeddings"] is True
    for size in ("num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size"):
        assert config[size] % 4 == 0, size
    assert config["num_hidden_layers"] % (2 * 2) == 0


def test_shipped_tokenizer_is_the_tools_and_fits_the_model(tokenizer, model):
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert len(tokenizer) == model.config.vocab_size
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("task", "config"),
    [
        (countdown, CountdownData(source="countdown", numbers=4, largest=99, operators="+-*/")),
        (arithmetic, ArithmeticData(source="arithmetic", terms=6, digits=6)),
    ],
)
def test_tokenizer_holds_every_character_of_the_generated_tasks(tokenizer, task, config):
    for problem in task.generate(config, seed=1, split="train", count=500):
        token_ids = tokenizer.encode(problem.question)
        assert len(token_ids) == len(problem.question)
        assert tokenizer.decode(token_ids) == problem.question


@pytest.mark.parametrize("text", ["(8+3)*2/1=22\n(8+3)*2/1", "\\boxed{-1,234}", " \n  3 :"])
def test_tokenizer_gives_responses_back_unchanged(tokenizer, text):
    ended = [*tokenizer.encode(text), tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert len(ended) == len(text) + 2
    assert tokenizer.decode(ended, skip_special_tokens=True) == text


def test_shipped_model_is_right_sometimes_and_not_always(model, tokenizer):
    torch.manual_seed(0)
    problems = countdown.generate(make_tiny_model.TASK, seed=2, split="test", count=32)
    counts = count_correct(model, tokenizer, problems, samples=16)
    assert 0.1 <= pass_at_k(counts, 16, 1).mean() <= 0.3
    assert 0.4 <= pass_at_k(counts, 16, 16).mean() <= 0.9


def test_worked_solutions_are_correct_and_never_of_a_test_problem():
    demonstrations = Demonstrations(numbers=3, largest=25, multiplying=0.3)
    rng = random.Random(0)
    for _ in range(300):
        worked = demonstrations.worked(rng)
        numbers, target = re.fullmatch(r"([\d ]+)=(\d+):", worked.question).groups()
        answer = countdown.pose([int(n) for n in numbers.split()], int(target)).answer
        assert split_of(answer) == "train"
        assert countdown.is_correct(worked.response, answer)
        working, expression = worked.response.split("\n")
        assert eval(expression) == int(target)
        steps = re.findall(r"(?=(?:^|=)(\d+[-+*]\d+)=(\d+))", working)
        assert len(steps) == 2
        assert all(eval(step) == int(total) for step, total in steps)


def test_guesses_use_the_numbers_and_are_mostly_wrong():
    demonstrations = Demonstrations(numbers=3, largest=25, multiplying=0.0)
    rng = random.Random(0)
    right = 0
    for _ in range(500):
        guess = demonstrations.guess(rng)
        numbers, target = re.fullmatch(r"([\d ]+)=(\d+):", guess.question).groups()
        assert sorted(re.findall(r"\d+", guess.response)) == sorted(numbers.split())
        assert guess.response.startswith(" ")
        right += eval(guess.response) == int(target)
    assert 0 < right < 250


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_mixture_holds_the_asked_share_of_worked_solutions(share):
    mixture = Demonstrations(3, 25, 0.01).mixture(random.Random(0), share)
    worked = sum("\n" in next(mixture).response for _ in range(1000))
    assert abs(worked / 1000 - share) < 0.05


def test_multiplying_sets_the_share_of_products():
    demonstrations = Demonstrations(3, 12, 0.2)
    rng = random.Random(0)
    guesses = "".join(demonstrations.guess(rng).response for _ in range(1000))
    assert abs(guesses.count("*") / 2000 - 0.2) < 0.03


def test_labels_are_the_response_and_its_end_alone(tokenizer):
    batch = [Demonstration("3 7=10:", "3+7"), Demonstration("3 7=4:", "7-3=4\n7-3")]
    token_ids, labels = collate(batch, tokenizer)
    for row, item in enumerate(batch):
        learned = labels[row] != -100
        assert torch.equal(labels[row][learned], token_ids[row][learned])
        assert tokenizer.decode(labels[row][learned]) == f"{item.response}<|endoftext|>"
        assert tokenizer.decode(token_ids[row], skip_special_tokens=True) == item.question + item.response


def test_training_learns_and_repeats_bit_for_bit(tokenizer, one_thread):
    recipe = Recipe(skill_steps=12, habit_steps=4, batch_size=8, warmup_steps=4)

    def trained():
        torch.manual_seed(0)
        model = build_model(tokenizer)
        losses = list(train(model, tokenizer, Demonstrations(3, 9, 0.0), recipe, seed=0))
        return losses, model.state_dict()

    (losses, first), (again, second) = trained(), trained()
    assert losses == again
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert abs(losses[0] - math.log(len(tokenizer))) < 0.2
    assert losses[-1] < 0.8 * losses[0]


def test_of_calls_what_the_calculator_answers_is_not_learned(tokenizer):
    """A call and an answer as `examples/tools` has them; what a line has before `=` is calculated."""
    source = Calls.of(ArithmeticData(source="arithmetic", digits=3, problems=50), seed=0)
    batch = list(itertools.islice(source.mixture(random.Random(0), 0.5), 40))
    token_ids, labels = collate(batch, tokenizer)
    called = 0
    for row, item in enumerate(batch):
        learned = tokenizer.decode(labels[row][labels[row] != -100])
        given = item.response[slice(*item.given)]
        assert learned == item.response.replace(given, "", 1) + "<|endoftext|>"
        answer = calculator(item.question.removesuffix("="))
        assert item.response.removeprefix(f"{item.question}{given}") == rf"\boxed{{{answer}}}"
        if given:
            called += 1
            assert given == f"{answer}\n"
        assert tokenizer.decode(token_ids[row], skip_special_tokens=True) == item.question + item.response
    assert 0 < called < 40


def test_retries_are_written_as_countdown_turns_does():
    """Questions before the last are the same, each with a guess that misses and what it comes to."""
    options = load_config([ROOT / "examples/turns/run.toml"]).environment.options
    base = Demonstrations(3, 25, 0.0)
    failed = 0
    for item in itertools.islice(Retries(base).mixture(random.Random(0), 0.5), 60):
        question = item.question.rpartition("\n")[2]
        numbers, _, target = question.rstrip(":").partition("=")
        answer = countdown.pose([int(number) for number in numbers.split()], int(target)).answer
        rest = item.question
        while rest != question:
            guess, _, behind = rest.removeprefix(question).partition("<|endoftext|>")
            value = countdown.comes_to(guess, answer)
            assert value is not None and value != int(target)
            verdict = options["wrong"].format(value=value, question=question)
            assert behind.startswith(verdict)
            rest = question + behind.removeprefix(verdict)
            failed += 1
    assert 30 < failed < 90


def test_guesses_multiply_more_where_they_are_to():
    """And worked solutions as before: what is solved by guesses alone is what RL may lose."""
    wide = Demonstrations(3, 25, 0.0, guesses_multiplying=1 / 3)
    guesses = [wide.guess(random.Random(seed)).response for seed in range(300)]
    share = sum(guess.count("*") for guess in guesses) / (2 * len(guesses))
    assert 0.25 < share < 0.42
    assert not any("*" in wide.worked(random.Random(seed)).response for seed in range(100))


def test_a_mixture_computes_at_first_what_the_model_does_that_it_is_made_of(model):
    mixture = upcycle(model, experts=4).eval()
    token_ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(mixture(token_ids).logits, model(token_ids).logits, rtol=0, atol=1e-4)
    assert mixture.config.model_type == "qwen2_moe"
    assert mixture.model.layers[0].mlp.gate.weight.std() > 0, "a router that chooses"
