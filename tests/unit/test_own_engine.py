"""A kind of engines from outside: chosen by the configuration, started, asked, given weights, found wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_rapo.config import RunConfig, Weights, validate
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.kinds import KINDS
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.engines import open_own_engines
from megatron_rapo.model.build import build_chunks
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.publish.opening import open_transport
from megatron_rapo.rollout.requests import sample_seed
from megatron_rapo.weights.load import load_weights
from tests.models import make_hf_model
from tests.pools import generate_groups
from tests.unit.one_rank import one_placement

FOLDER = Path(__file__).parents[1] / "toy_engine"
PAGE = Path(__file__).parents[2] / "docs/engines.md"
PROMPTS = [Prompt(number, "", (number, 9), "") for number in range(4)]
TOY = {"kind": "toy_kind:Toy"}


def configuration(
    tmp_path: Path, engine: dict[str, Any], model: Path = Path("model"), **options: Any
) -> RunConfig:
    values = {
        "run": {"directory": str(tmp_path / "run"), "steps": 1, "code": [str(options.pop("code", FOLDER))]},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"source": "countdown"},
        "rollout": {"prompts_per_step": 4, "max_response_tokens": 8, "engine": engine, **options},
    }
    return validate(values, source="run.toml")


@pytest.fixture(scope="module")
def placement() -> Iterator[Placement]:
    with one_placement() as alone:
        yield alone


def test_a_kind_from_outside_is_started_given_weights_and_asked(placement: Placement, tmp_path: Path) -> None:
    model = make_hf_model(tmp_path / "model", num_hidden_layers=1)
    architecture = read_architecture(model)
    config = configuration(tmp_path, {**TOY, "servers": 2}, model, prompts_per_request=1, minimum_engines=2)
    chunks = build_chunks(architecture, config.model, placement.layout)
    load_weights(chunks, architecture, model, placement.tensor_rank)
    expected = {
        name: float(values.double().sum()) for name, values in load_file(model / "model.safetensors").items()
    }
    with open_own_engines(config, architecture) as pool:
        assert (len(pool.urls), pool.software(), pool.one_request_at_a_time()) == (2, "toy 1", False)
        for version, transport in enumerate(["tensor", "disk"], 3):
            weights = Weights.model_validate({"transport": transport})
            folder = tmp_path / transport
            way = open_transport(weights, config.model, chunks, architecture, placement, folder)
            way.send(pool, version)
            states = pool.each(lambda engine, _: engine._tell("state"), pool.urls).result()  # type: ignore[attr-defined]
            for state in states:
                assert state["name"] == str(version)
                assert state["sums"] == pytest.approx(expected, rel=1e-6)
            sampling = {"max_response_tokens": 2, "temperature": 1.0, "weight_version": version, "seed": 5}
            groups = generate_groups(pool, PROMPTS, responses_per_prompt=2, **sampling)
            for prompt, group in zip(PROMPTS, groups, strict=True):
                assert group is not None
                for number, response in enumerate(group.responses):
                    seed = sample_seed(5, prompt, number)
                    assert response.token_ids.tolist() == [prompt.token_ids[0], seed % 7]
                    assert response.log_probs.tolist() == [-0.25, -0.25]
        stale = {"max_response_tokens": 2, "temperature": 1.0, "weight_version": 9, "seed": 5}
        assert generate_groups(pool, PROMPTS, responses_per_prompt=2, **stale) == [None] * 4
        assert all("weights version '4' in place of 9" in reason for reason in pool.failures.values())


def test_it_is_kept_with_the_run_and_read_again(tmp_path: Path) -> None:
    config = configuration(tmp_path, {**TOY, "python": "/opt/python"})
    kept = config.resolved()
    assert kept["rollout"]["engine"] == {**TOY, "urls": [], "servers": 1, "python": "/opt/python"}
    assert validate(kept, source="again") == config
    assert type(config.engine_kind).__name__ == "Toy"


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"kind": "toy_kind:Toi"}, r'rollout\.engine\.kind = "toy_kind:Toi": .*did you mean "toy_kind:Toy"'),
        ({"kind": "toy_king:Toy"}, r'there is no module toy_king in .*did you mean "toy_kind:Toy"'),
        ({"kind": "toy_kind:NO_KIND"}, r'"toy_kind:NO_KIND" .* is no class that inherits from EngineKind'),
        (
            {"kind": "toy_kind:Given"},
            r"kind = \"toy_kind:Given\" starts no servers; name running ones in urls",
        ),
        (
            {**TOY, "device": "cpu"},
            r'device = "cpu" is not an option of kind = "toy_kind:Toy"; kind = "embedded"',
        ),
        ({**TOY, "pyton": 1}, r"is not an option of kind = .*, which has kind, urls, servers, python"),
        ({**TOY, "python": 3}, r"rollout\.engine\.python = 3: must be text"),
        (
            {**TOY, "urls": ["http://a:1"], "python": "p"},
            r"python = 'p' would have no effect: urls name running",
        ),
        (
            {"kind": "toy"},
            r'rollout\.engine\.kind = "toy" is no kind of engines; choose one of embedded, sglang',
        ),
    ],
)
def test_what_is_wrong_with_it_is_told_at_once(engine: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RapoError, match=message):
        configuration(tmp_path, engine)


def test_given_servers_need_no_launcher(tmp_path: Path) -> None:
    config = configuration(tmp_path, {"kind": "toy_kind:Given", "urls": ["http://127.0.0.1:1"]})
    assert config.engine_kind.connect.__name__ == "ToyEngine"  # type: ignore[attr-defined]


def test_a_name_in_the_table_is_all_that_a_kind_of_the_package_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = type(configuration(tmp_path, TOY).engine_kind)
    monkeypatch.setitem(KINDS, "toy", toy)  # type: ignore[arg-type]
    values = configuration(tmp_path, TOY).resolved()
    values["rollout"]["engine"] = {"kind": "toy", "servers": 3}
    del values["run"]["code"]
    config = validate(values, source="run.toml")
    assert (config.rollout.engine.count, type(config.engine_kind)) == (3, toy)


def test_the_pages_example_is_a_kind(tmp_path: Path) -> None:
    [source] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "page_engines.py").write_text(source)
    engine = {"kind": "page_engines:Kind", "urls": ["http://127.0.0.1:1"]}
    config = configuration(tmp_path, engine, code=tmp_path)
    assert config.engine_kind.connect.__name__ == "Client"  # type: ignore[attr-defined]
