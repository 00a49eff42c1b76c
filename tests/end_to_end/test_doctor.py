"""`megatron-rapo doctor --mismatch` by the console command, on what a finished run left."""

from __future__ import annotations

from pathlib import Path

from tests.end_to_end.command import Command, metrics

Finished = tuple[Path, Command]


def test_it_clears_the_run_and_leaves_it_as_it_was(finished: Finished) -> None:
    directory = finished[0]
    before = {path: path.read_bytes() for path in directory.glob("*.*") if path.is_file()}
    command = Command(["doctor", "--mismatch", str(directory / "config.toml")])
    assert command.wait() == 0, command.stdout + command.stderr
    assert "publishing the run's weights, version 4" in command.stdout
    assert command.stdout.endswith("nothing found\n")
    assert command.left_processes() == []
    assert {path: path.read_bytes() for path in directory.glob("*.*") if path.is_file()} == before
    assert metrics(directory)[-1]["step"] == 4
    assert not list(directory.glob("doctor/weights/*"))


def test_it_says_what_it_wants(tmp_path: Path) -> None:
    command = Command(["doctor", "--mismatch"])
    assert command.wait() == 1
    assert "needs a configuration; name a TOML file: --mismatch is about a run" in command.stderr
