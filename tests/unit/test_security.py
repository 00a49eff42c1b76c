"""The engines' key is a secret: it stands in the environment, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import httpx
import psutil
import pytest

from megatron_rapo.config.load import validate
from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.embedded.launcher import EmbeddedLauncher
from megatron_rapo.engines.kinds import KINDS
from megatron_rapo.engines.servers import LocalServers
from megatron_rapo.wire.access import API_KEY_VARIABLE

KEY = "key-that-nobody-may-read-5f1c"
MODEL = Path(__file__).parents[2] / "examples/models/tiny-countdown"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)


def test_a_server_that_demands_it_shows_it_nowhere(tmp_path: Path) -> None:
    """Neither in arguments, which every user of the machine sees, nor in its log."""
    launcher = EmbeddedLauncher(MODEL, device="cpu", dtype="float32", threads=1)
    with LocalServers(
        launcher, EmbeddedClient, count=1, log_directory=tmp_path, startup_timeout=240.0
    ) as servers:
        [url] = servers.urls
        assert httpx.get(f"{url}/model_info").status_code == 401, "and it does demand it"
        asked = httpx.get(f"{url}/model_info", headers={"authorization": f"Bearer {KEY}"})
        assert asked.status_code == 200 and KEY not in asked.text
        words = [" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])]
        assert any("embedded_server" in one for one in words)
        assert not any(KEY in one for one in words)
    logs = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert logs and not any(KEY.encode() in path.read_bytes() for path in logs)


def test_no_configuration_and_no_script_has_it() -> None:
    """A job hands it on by its name; SGLang's alone becomes an argument, as docs/security.md says."""
    config = validate(
        {
            "run": {"directory": "/shared/run", "steps": 4},
            "model": {"path": str(MODEL)},
            "data": {"source": "countdown", "numbers": 3},
            "rollout": {"prompts_per_step": 4, "max_response_tokens": 8},
        },
        "test",
    )
    assert KEY not in str(config.resolved())
    for kind in KINDS.values():
        assert KEY not in kind.bash
        assert f'"${API_KEY_VARIABLE}"' not in kind.bash or kind.__name__ == "SGLang"
