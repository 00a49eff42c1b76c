"""Decoding, against transformers' own generation and full forwards."""

import math
import threading

import pytest
import torch

from megatron_rapo.embedded_server import decode as decoding
from megatron_rapo.embedded_server.decode import Sample
from megatron_rapo.embedded_server.engine import Engine
from tests.models import EOS, load_reference, make_hf_model

# Of unequal lengths, the first one twice.
PROMPTS = [(5, 6, 7), (9,), (20, 21, 22, 23, 24, 25, 26), (5, 6, 7), (30, 40), (2,) * 12]


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def models(request, tmp_path_factory):
    """The engine, and transformers' model of the same weights."""
    return models_of(tmp_path_factory.mktemp("model"), request.param)


def models_of(path, family, **options):
    make_hf_model(path, family=family, initializer_range=0.2, **options)
    return Engine(path, "cpu", "float32"), load_reference(path)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
OTHERS = {
    "gemma3_text": {},
    "olmo2": {},
    "olmo3": {"rope_parameters": YARN},
    "glm": {},
    "glm4": {},
    "mistral": {"sliding_window": 7},
    "smollm3": {"use_sliding_window": True, "sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_decoded_as_full_forwards_have_it(tmp_path, family):
    """Those with windows too, that most tokens are beyond; prompts of other lengths stand beside."""
    engine, reference = models_of(tmp_path, family, **OTHERS[family])
    samples = [sample(prompt, i, stop_ids=range(1, 6)) for i in range(3) for prompt in PROMPTS]
    completions = run(engine, samples)
    assert max(len(completion.token_ids) for completion in completions) == 20
    for one, completion in zip(samples, completions, strict=True):
        expected = log_probs_of(reference, one.prompt, completion.token_ids)
        torch.testing.assert_close(torch.tensor(completion.log_probs).double(), expected, atol=1e-4, rtol=0)


def sample(prompt, seed=0, *, max_new_tokens=20, temperature=1.0, stop_ids=(EOS,), **limits):
    return Sample(tuple(prompt), max_new_tokens, temperature, frozenset(stop_ids), seed, **limits)


def run(engine, samples):
    return engine.generate(samples, threading.Event())


def log_probs_of(model, prompt, response, temperature=1.0):
    """Each response token's log-prob, by one full forward."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double()
    return torch.log_softmax(logits / temperature, -1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def test_greedy_is_what_transformers_generates(models):
    engine, reference = models
    completions = run(engine, [sample(prompt, temperature=0.0, max_new_tokens=40) for prompt in PROMPTS])
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=40,
            attention_mask=torch.ones(1, len(prompt)),
        )[0, len(prompt) :].tolist()
        assert completion.token_ids == expected


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_log_probs_are_those_of_a_full_forward(models, temperature):
    engine, reference = models
    options = {"temperature": temperature, "max_new_tokens": 60, "stop_ids": range(1, 6)}
    samples = [sample(prompt, i, **options) for i in range(8) for prompt in PROMPTS]
    completions = run(engine, samples)
    assert len({len(completion.token_ids) for completion in completions}) > 8  # rows left at many steps
    for one, completion in zip(samples, completions, strict=True):
        expected = log_probs_of(reference, one.prompt, completion.token_ids, temperature)
        torch.testing.assert_close(torch.tensor(completion.log_probs).double(), expected, atol=1e-4, rtol=0)


def test_first_tokens_follow_the_models_distribution(models):
    engine, reference = models
    prompt, rows, temperature = PROMPTS[0], 8192, 0.8
    samples = [sample(prompt, seed, max_new_tokens=1, temperature=temperature) for seed in range(rows)]
    tokens = torch.tensor([completion.token_ids[0] for completion in run(engine, samples)])
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt])).logits[0, -1].double()
    expected = rows * torch.softmax(logits / temperature, -1)
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    common = expected >= 5
    observed, expected = (torch.cat([x[common], x[~common].sum()[None]]) for x in (counts, expected))
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    degrees = len(expected) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_a_response_does_not_depend_on_its_batch(models):
    engine, _ = models
    samples = [sample(prompt, 100 + i, max_new_tokens=30) for i in range(4) for prompt in PROMPTS]
    together = run(engine, samples)
    for one, completion in zip(samples, together, strict=True):
        [alone] = run(engine, [one])
        assert alone.token_ids == completion.token_ids
    assert run(engine, samples) == together  # bit for bit


def test_requests_larger_than_a_batch_are_decoded_in_pieces(models, monkeypatch):
    engine, _ = models
    samples = [sample(prompt, i) for i in range(4) for prompt in PROMPTS]
    whole = [completion.token_ids for completion in run(engine, samples)]
    monkeypatch.setattr("megatron_rapo.embedded_server.engine.MAX_ROWS", 7)
    assert [completion.token_ids for completion in run(engine, samples)] == whole


def test_the_cache_grows_beyond_its_first_room(models, monkeypatch):
    engine, _ = models
    samples = [sample(prompt, 0, max_new_tokens=50, stop_ids=()) for prompt in PROMPTS]
    roomy = [completion.token_ids for completion in run(engine, samples)]
    monkeypatch.setattr(decoding, "ROOM", 2)
    assert [completion.token_ids for completion in run(engine, samples)] == roomy


def test_each_row_ends_by_its_own_limit_and_stop_tokens(models):
    engine, _ = models
    free = run(engine, [sample(PROMPTS[0], 3, stop_ids=())])[0].token_ids
    stop = free[6]
    short, long, stopped = run(
        engine,
        [
            sample(PROMPTS[0], 3, stop_ids=(), max_new_tokens=4),
            sample(PROMPTS[0], 3, stop_ids=(), max_new_tokens=9),
            sample(PROMPTS[0], 3, stop_ids=(stop, 60)),
        ],
    )
    assert (short.token_ids, short.finish) == (free[:4], "length")
    assert (long.token_ids, long.finish) == (free[:9], "length")
    assert (stopped.token_ids, stopped.finish) == (free[: free.index(stop) + 1], "stop")
    assert len(stopped.log_probs) == len(stopped.token_ids)


def test_an_abort_ends_responses_as_they_are(models):
    engine, _ = models
    aborted = threading.Event()
    aborted.set()
    [completion] = engine.generate([sample(PROMPTS[0])], aborted)
    assert (completion.token_ids, completion.finish) == ([], "abort")


def test_broken_weights_are_an_error(models, monkeypatch):
    engine, _ = models
    parameter = next(engine._model.parameters())
    whole = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(torch.nan)
    try:
        with pytest.raises(FloatingPointError, match="not finite"):
            run(engine, [sample(PROMPTS[0])])
    finally:
        with torch.no_grad():
            parameter.copy_(whole)


class Noted:
    """Notes what decoding does of its work: draws, forwards, and rows that are kept."""

    def __init__(self, monkeypatch):
        self.draws, self.forwards, self.kept, self.room = 0, 0, [], []
        draw, forward, select = decoding.draw, decoding._forward, decoding.Cache.batch_select_indices
        cache = decoding.growing_cache

        def drawn(*arguments):
            self.draws += 1
            return draw(*arguments)

        def forwarded(*arguments):
            self.forwards += 1
            return forward(*arguments)

        def selected(of, indices):
            self.kept.append(len(indices))
            return select(of, indices)

        def made(layers, room):
            self.room.append(room)
            return cache(layers, room)

        monkeypatch.setattr(decoding, "draw", drawn)
        monkeypatch.setattr(decoding, "_forward", forwarded)
        monkeypatch.setattr(decoding.Cache, "batch_select_indices", selected)
        monkeypatch.setattr(decoding, "growing_cache", made)


def test_rows_that_have_ended_are_dropped_once_they_are_many(models, monkeypatch):
    engine, _ = models
    noted = Noted(monkeypatch)
    run(engine, [sample(PROMPTS[0], i, max_new_tokens=i + 1, stop_ids=()) for i in range(10)])
    # Of ten rows one ends at each token: eight of ten are few enough, seven of eight are not, …
    assert noted.kept == [10, 8, 6, 5, 4, 3, 2, 1]
    assert (noted.draws, noted.forwards) == (10, 9), "no work for a token that nobody has"


@pytest.mark.parametrize(("max_new_tokens", "room"), [(5, 12 + 5), (300, 12 + 256)])
def test_the_cache_has_room_for_the_response_up_to_a_bound(models, monkeypatch, max_new_tokens, room):
    engine, _ = models
    noted = Noted(monkeypatch)
    aborted = threading.Event()
    aborted.set()
    engine.generate([sample(prompt, max_new_tokens=max_new_tokens) for prompt in PROMPTS], aborted)
    assert noted.room == [room]


def test_an_abort_is_heeded_before_the_next_token(models):
    engine, _ = models
    whole = run(engine, [sample(prompt, 1, stop_ids=()) for prompt in PROMPTS])

    class ThirdLook(threading.Event):
        looks = 0

        def is_set(self):
            self.looks += 1
            return self.looks == 3

    cut = engine.generate([sample(prompt, 1, stop_ids=()) for prompt in PROMPTS], ThirdLook())
    for one, other in zip(cut, whole, strict=True):
        assert (one.token_ids, one.finish) == (other.token_ids[:2], "abort")


def test_rows_with_fewer_stop_tokens_have_no_others(models):
    engine, _ = models
    samples = [sample(PROMPTS[0], seed, stop_ids=()) for seed in range(30)]
    free = run(engine, samples)
    tokens = [token for completion in free for token in completion.token_ids]
    assert {1, 2} <= set(tokens)  # what a filled-up row could be taken to have
    beside = run(engine, [*samples, sample(PROMPTS[0], 0, stop_ids=range(50, 61))])
    assert beside[:-1] == free


@pytest.mark.parametrize(
    "limits", [{"top_k": 1}, {"top_p": 1e-6}, {"top_p": 1e-6, "top_k": 5}, {"top_p": 1.0, "top_k": 1}]
)
def test_limits_of_one_row_are_not_the_others(models, limits):
    """The likeliest token alone is greedy decoding, with the log-probs of sampling."""
    engine, reference = models
    limited, free, greedy = (
        sample(PROMPTS[2], 5, stop_ids=(), max_new_tokens=6, **limits),
        sample(PROMPTS[2], 5, stop_ids=(), max_new_tokens=6),
        sample(PROMPTS[2], 5, stop_ids=(), max_new_tokens=6, temperature=0.0),
    )
    [expected_free], [expected] = run(engine, [free]), run(engine, [greedy])
    found = run(engine, [limited, free])
    assert found[0].token_ids == expected.token_ids != expected_free.token_ids
    assert found[1].token_ids == expected_free.token_ids
    expected_log_probs = log_probs_of(reference, PROMPTS[2], found[0].token_ids)
    torch.testing.assert_close(
        torch.tensor(found[0].log_probs).double(), expected_log_probs, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("values", [[0.0, math.nan], [-math.inf, -1.0], [math.nan, math.nan]])
def test_one_log_prob_that_is_not_finite_is_an_error(values):
    arguments = torch.tensor([[3, 4, 0]]), torch.tensor([[*values, math.nan]]), torch.tensor([2])
    with pytest.raises(FloatingPointError, match="not finite"):
        decoding._completions([sample(PROMPTS[0])], *arguments)
    fine = torch.tensor([[-0.5, -1.0, math.nan]])  # beyond its end nothing counts
    [completion] = decoding._completions([sample(PROMPTS[0])], arguments[0], fine, arguments[2])
    assert completion.log_probs == [-0.5, -1.0]
