"""Diagnostics of correct responses against whole logits of both models; diversity by all subsets."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation import diagnosis, diagnostics
from megatron_rapo.evaluation.diagnostics import Diagnostics, Pair, diagnose
from megatron_rapo.evaluation.diversity import Diversity, diversity
from megatron_rapo.evaluation.manifest import ModelRecord, SettingRecord
from megatron_rapo.evaluation.store import Problem, SampleStore, StoredSample
from megatron_rapo.fingerprint import weights_fingerprint
from tests.models import make_hf_model
from tests.unit.stored import store

PROMPTS = {"a": (3, 4, 5), "b": (6, 7)}
RESPONSES = {("a", 0): (8, 9, 10, 11, 12, 13, 1), ("b", 0): (20, 1), ("b", 1): (21, 22, 1)}
TEMPERATURE = 0.7
SETTING = SettingRecord(name="t0.7", temperature=TEMPERATURE, max_response_tokens=8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "model")):
        make_hf_model(folder / name, seed=seed)
    return folder / "base", folder / "model"


def stored(directory: Path, texts: dict[tuple[str, int], str] | None = None) -> SampleStore:
    """RESPONSES, all correct, and a wrong one."""
    store = SampleStore(directory, [Problem(name, "?", "1", ids) for name, ids in PROMPTS.items()])
    rows = [
        *((*key, Outcome.CORRECT, ids) for key, ids in RESPONSES.items()),
        ("a", 1, Outcome.WRONG, (30, 1)),
    ]
    store.write(
        [
            StoredSample(
                problem=problem,
                sample=sample,
                outcome=outcome,
                extracted="1",
                truncated=False,
                seed=0,
                text=(texts or {}).get((problem, sample), ""),
                token_ids=np.array(ids, dtype=np.int32),
                log_probs=np.zeros(len(ids), dtype=np.float32),
            )
            for problem, sample, outcome, ids in rows
        ]
    )
    return store


def whole_log_probs(path: Path, key: tuple[str, int], vocabulary: int) -> torch.Tensor:
    """`[response tokens, vocabulary]`, from one forward through everything."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    prompt, response = PROMPTS[key[0]], RESPONSES[key]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, :, :vocabulary]
    return torch.log_softmax(logits[len(prompt) - 1 : -1] / TEMPERATURE, dim=-1)


def test_log_probs_divergences_and_entropies_are_those_of_whole_logits(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnostics, "CHUNK", 3)
    pair = Pair(*models)
    found = diagnose(stored(tmp_path), SETTING, pair, limit=10)
    assert found is not None and found.responses == 3
    assert found.reaching == (3, 3, 2, 1, 1, 1, 1)
    forward = np.full((3, 7), np.nan)
    base_total, model_total = [], []
    entropies = {path: np.full((3, 7), np.nan) for path in models}
    reverse = np.full((3, 7), np.nan)
    for row, (key, ids) in enumerate(RESPONSES.items()):
        base, model = (whole_log_probs(path, key, pair.vocabulary) for path in models)
        places = torch.arange(len(ids))
        base_total.append(float(base[places, list(ids)].sum()))
        model_total.append(float(model[places, list(ids)].sum()))
        forward[row, : len(ids)] = torch.nn.functional.kl_div(
            model, base, log_target=True, reduction="none"
        ).sum(1)
        reverse[row, : len(ids)] = torch.nn.functional.kl_div(
            base, model, log_target=True, reduction="none"
        ).sum(1)
        for path, log_probs in zip(models, (base, model), strict=True):
            entropies[path][row, : len(ids)] = torch.distributions.Categorical(logits=log_probs).entropy()
    assert sorted(found.base_log_prob) == pytest.approx(sorted(base_total), rel=1e-4)
    assert sorted(found.model_log_prob) == pytest.approx(sorted(model_total), rel=1e-4)
    assert found.forward_kl == pytest.approx(np.nanmean(forward, axis=0), rel=1e-3)
    assert found.reverse_kl == pytest.approx(np.nanmean(reverse, axis=0), rel=1e-3)
    for path, told in zip(models, (found.base_entropy, found.model_entropy), strict=True):
        assert told == pytest.approx(np.nanmean(entropies[path], axis=0), rel=1e-3)
    texts = [[pair._tokenizer.decode([token]) for token in ids] for ids in RESPONSES.values()]
    digits = [
        (row, place) for row, ids in enumerate(texts) for place, text in enumerate(ids) if text.isdigit()
    ]
    told_digits = found.kinds["digits"]
    assert told_digits.tokens == len(digits) > 0
    assert told_digits.model_entropy == pytest.approx(
        np.mean([entropies[models[1]][one] for one in digits]), rel=1e-3
    )
    assert told_digits.reverse_kl == pytest.approx(np.mean([reverse[one] for one in digits]), rel=1e-3)
    assert sum(one.tokens for one in found.kinds.values()) == sum(map(len, RESPONSES.values()))


@pytest.mark.parametrize(("gpu", "device"), [(True, "cuda"), (False, "cpu")])
def test_models_are_where_they_are_computed_fastest(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, device: str
) -> None:
    told: list[object] = []

    class Network:
        def to(self, where: str) -> Network:
            told.append(where)
            return self

        def eval(self) -> Network:
            told.append("eval")
            return self

    def load(path: Path, **options: object) -> Network:
        told.append((path, options))
        return Network()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(diagnostics.AutoModelForCausalLM, "from_pretrained", load)
    diagnostics._load(Path("m"), "bfloat16")
    # Nothing is fetched, and nothing is run that came with the weights.
    options = {"dtype": torch.bfloat16, "local_files_only": True, "use_safetensors": True}
    assert told == [(Path("m"), options), device, "eval"]


def test_a_model_does_not_diverge_from_itself(models: tuple[Path, Path], tmp_path: Path) -> None:
    found = diagnose(stored(tmp_path), SETTING, Pair(models[0], models[0]), limit=10)
    assert found is not None
    assert max(np.abs(found.forward_kl)) == max(np.abs(found.reverse_kl)) == 0
    assert found.base_log_prob == found.model_log_prob


def test_tokens_below_the_floor_are_counted(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, store = Pair(*models), stored(tmp_path)
    floor = float(whole_log_probs(models[0], ("b", 0), pair.vocabulary)[0, 20]) + 1e-3
    log_probs = [
        float(line[token])
        for key, ids in RESPONSES.items()
        for line, token in zip(whole_log_probs(models[0], key, pair.vocabulary), ids, strict=True)
    ]
    monkeypatch.setattr(diagnostics, "FLOOR", floor)
    found = diagnose(store, SETTING, pair, limit=10)
    assert found is not None
    assert found.tokens_below_floor == pytest.approx(np.mean(np.array(log_probs) < floor))
    assert found.responses_below_floor >= 1 / 3


def test_the_limit_takes_every_problem_first(models: tuple[Path, Path], tmp_path: Path) -> None:
    found = diagnose(stored(tmp_path), SETTING, Pair(*models), limit=2)
    assert isinstance(found, Diagnostics)
    assert found.reaching[:3] == (2, 2, 1)  # the long one of a, and the first of b


def test_without_a_correct_response_there_are_no_diagnostics(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    wrong = store(tmp_path, np.zeros((2, 4), dtype=bool)).samples("sums", "t1")
    assert diagnose(wrong, SETTING, Pair(*models), limit=10) is None
    assert diversity(wrong).problems == 0


def test_models_of_other_vocabularies_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    make_hf_model(tmp_path / "other", vocab_size=50)
    with pytest.raises(
        RapoError, match=r"vocabulary of \d+, .* of 50: the model was not trained from this base"
    ):
        Pair(models[0], tmp_path / "other")


def test_the_vocabulary_reaches_to_the_highest_id(models: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(models[0], tmp_path / "base")
    file = tmp_path / "base/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokens = tokenizer["model"]["vocab"]
    removed = [token for token, number in tokens.items() if 40 <= number < 50]
    tokenizer["model"]["vocab"] = {token: tokens[token] for token in tokens if token not in removed}
    file.write_text(json.dumps(tokenizer))
    assert len(removed) == 10
    assert Pair(tmp_path / "base", models[1]).vocabulary == 61


def test_diversity_is_the_number_of_kinds_among_four(tmp_path: Path) -> None:
    texts = ["so 1 + 2 = 3", "thus 1+2=3", "2+1=3", "3", "1 + 2 = 3!"]
    kinds = [0, 0, 1, 2, 0]
    store = SampleStore(tmp_path, [Problem("a", "?", "3", (1,)), Problem("b", "?", "3", (1,))])
    store.write(
        [
            StoredSample(
                problem="a" if number < 5 else "b",
                sample=number,
                outcome=Outcome.CORRECT,
                extracted="3",
                truncated=False,
                seed=0,
                text=text,
                token_ids=np.array([1], dtype=np.int32),
                log_probs=np.zeros(1, dtype=np.float32),
            )
            for number, text in enumerate([*texts, "3"])
        ]
    )
    found = diversity(store)
    expected = np.mean([len({kinds[place] for place in four}) for four in combinations(range(5), 4)])
    assert (found.problems, found.answers) == (1, 1.0)
    assert found.forms == pytest.approx(expected)


def test_stored_evaluations_find_their_models(models: tuple[Path, Path], tmp_path: Path) -> None:
    correct = np.ones((2, 4), dtype=bool)
    base, model = (
        store(
            tmp_path / path.name,
            correct,
            model=ModelRecord(path=str(path), fingerprint=weights_fingerprint(path)),
        )
        for path in models
    )
    said = diagnosis.run(base, model, limit=3, directory=tmp_path / "out")
    assert "3 correct responses of the model" in said
    [found] = json.loads((tmp_path / "out" / "diagnostics.json").read_text())
    assert found["diagnostics"]["responses"] == 3
    assert found["diversity"]["model"]["problems"] == 2
    moved = ModelRecord(path=str(models[0]), fingerprint="other")
    other = type(base)(base.directory, base.manifest.model_copy(update={"model": moved}))
    with pytest.raises(RapoError, match="has other weights than"):
        diagnosis.run(other, model, limit=3, directory=tmp_path / "out")
    gone = ModelRecord(path="model", run=str(tmp_path), step=7)
    other = type(base)(base.directory, base.manifest.model_copy(update={"model": gone}))
    with pytest.raises(RapoError, match=r"are not at .*step_000007 any more"):
        diagnosis.run(other, model, limit=3, directory=tmp_path / "out")


def test_the_lines_by_hand() -> None:
    """Of a token: weighed by the responses that reach its position, not by position."""
    found = Diagnostics(
        responses=3,
        base_log_prob=(-10.0, -20.0, -33.0),
        model_log_prob=(-1.0, -2.0, -6.0),
        tokens_below_floor=0.0125,
        responses_below_floor=0.25,
        forward_kl=(0.1, 0.5),
        reverse_kl=(0.2, 0.6),
        base_entropy=(1.0, 3.0),
        model_entropy=(0.5, 2.5),
        reaching=(3, 1),
    )
    assert diagnosis._lines(found, Diversity(4, 1.25, 2.5), Diversity(5, 1.0, 1.75)) == [
        "  3 correct responses of the model, mean log-prob under the base -21.0, under the model -3.0 nats",
        "  below 0.0001 under the base: 1.25% of tokens; 25.0% of responses have such a token",
        "  a token: KL(base ‖ model) 0.2000, KL(model ‖ base) 0.3000, entropy of the base 1.500, of the "
        "model 1.000 nats",
        "  forms among 4 correct responses: base 2.50 (4 problems), model 1.75 (5)",
    ]
    assert diagnosis._lines(None, Diversity(0, 0.0, 0.0), Diversity(0, 0.0, 0.0)) == [
        "  the model has no correct response"
    ]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (ModelRecord(path="{tmp}/hf", fingerprint="f"), "hf"),
        (ModelRecord(path="{tmp}/hf", run="{tmp}/run", step=3, fingerprint="f"), "hf"),
        (ModelRecord(path="{tmp}/hf", run="{tmp}/run", step=3), "run/checkpoints/step_000003"),
        (ModelRecord(path="{tmp}/hf", run="{tmp}/run", step=0), "hf"),  # the base that the run began with
        (ModelRecord(path="{tmp}/hf"), "hf"),
    ],
)
def test_weights_are_looked_for_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: ModelRecord, expected: str
) -> None:
    """A run's engines had them from memory; a checkpoint of the step has the same ones."""
    for folder in ("hf", "run/checkpoints/step_000003"):
        (tmp_path / folder).mkdir(parents=True)
    opened: list[tuple[Path, Path]] = []

    def open_model(path: Path, scratch: Path) -> tuple[Path, ModelRecord]:
        opened.append((path, scratch))
        return tmp_path / "exported", ModelRecord(path="", fingerprint="f")

    monkeypatch.setattr(diagnosis, "open_model", open_model)
    values = {name: str(value).format(tmp=tmp_path) for name, value in record if isinstance(value, str)}
    model = record.model_copy(update=values)
    evaluation = store(tmp_path / "evaluation", np.zeros((1, 1), dtype=bool), model=model)
    assert diagnosis._weights(evaluation, tmp_path / "scratch") == tmp_path / "exported"
    assert opened == [(tmp_path / expected, tmp_path / "scratch")]


def test_a_response_with_a_token_that_does_not_exist_is_left_out(tmp_path: Path) -> None:
    """And of two responses to a problem the one of the smaller number comes first."""
    kept = [row.response for row in diagnostics._choose(stored(tmp_path), 3, 22)]
    assert sorted(kept) == [RESPONSES["a", 0], RESPONSES["b", 0]]
    kept = [row.response for row in diagnostics._choose(stored(tmp_path / "more"), 2, 23)]
    assert sorted(kept) == [RESPONSES["a", 0], RESPONSES["b", 0]]
    rows = diagnostics._choose(stored(tmp_path / "all"), 3, 23)
    assert {row.response: row.prompt for row in rows} == {
        response: PROMPTS[problem] for (problem, _), response in RESPONSES.items()
    }
