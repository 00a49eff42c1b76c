"""A folder that is written to belongs to one process, and is named where its disk fails."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_rapo import folder
from megatron_rapo.convert.destination import new_directory
from megatron_rapo.errors import RapoError
from megatron_rapo.folder import own_folder, writing_to

HOLDER = """
import sys, time
from contextlib import ExitStack
from pathlib import Path
from megatron_rapo.convert.destination import new_directory
from megatron_rapo.folder import own_folder
with ExitStack() as stack:
    stack.enter_context(eval(sys.argv[2])(Path(sys.argv[1])))
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(path: Path, by: str = 'lambda path: own_folder(path, "--out")') -> Iterator[subprocess.Popen[str]]:
    """Another process holds the folder, until its standard input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), by],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_second_process_is_kept_out_and_told_who_is_there(tmp_path: Path) -> None:
    with held(tmp_path / "run") as process:
        holder = rf"process {process.pid} on \S+, since 2\d{{3}}-\S+; wait for its end"
        with (
            pytest.raises(RapoError, match=rf"^run\.directory = .*run is in use by {holder}"),
            own_folder(tmp_path / "run", "run.directory"),
        ):
            pytest.fail("two processes in one folder")


def test_a_kill_frees_the_folder(tmp_path: Path) -> None:
    with held(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    with own_folder(tmp_path, "--out"):
        assert (tmp_path / folder.LOCK).exists()
    assert list(tmp_path.iterdir()) == [], "nothing is left of the lock"


def test_a_lock_that_its_holder_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened before the holder's end, locked after it: another file is at its place, or will be."""
    opened: list[int] = []
    real = os.open

    def open_one_that_is_removed(*arguments: object) -> int:
        descriptor = real(*arguments)  # type: ignore[arg-type]
        if not opened:
            (tmp_path / folder.LOCK).unlink()
        opened.append(descriptor)
        return descriptor

    monkeypatch.setattr(os, "open", open_one_that_is_removed)
    with own_folder(tmp_path, "--out"):
        assert os.path.samestat(os.fstat(opened[-1]), (tmp_path / folder.LOCK).stat())
    assert len(opened) == 2


def test_a_holder_on_another_machine_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folder, "OTHER_HOST_WAIT_S", 10.0)
    with held(tmp_path) as process:
        monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")

        def end(_: float) -> None:
            process.kill()
            process.wait()  # with a limit it would sleep, by this very function

        monkeypatch.setattr(folder.time, "sleep", end)
        with own_folder(tmp_path, "--out"):
            assert "waiting, should that machine be gone" in capsys.readouterr().out


def test_one_process_does_not_take_a_folder_twice(tmp_path: Path) -> None:
    with own_folder(tmp_path, "--out"):
        with pytest.raises(RapoError, match="by this very process"), own_folder(tmp_path, "--out"):
            pytest.fail("taken twice")
        with held_refused(tmp_path) as refused:
            assert "is in use by process" in refused


@contextmanager
def held_refused(path: Path) -> Iterator[str]:
    """What another process is told that wants the folder."""
    found = subprocess.run(
        [sys.executable, "-c", HOLDER, str(path), 'lambda path: own_folder(path, "--out")'],
        input="",
        capture_output=True,
        text=True,
        timeout=60,
    )
    yield found.stderr


def test_a_destination_that_is_being_made_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with (
        held(path, "lambda path: new_directory(path, 0)"),
        pytest.raises(RapoError, match=r"model is in use by process \d+"),
        new_directory(path, 0),
    ):
        pytest.fail("made twice at once")
    assert not path.exists()


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder.fcntl, "lockf", no_locks)
    with own_folder(tmp_path, "--out"):
        assert "cannot be locked (No locks available), so nothing keeps" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_fails_at_a_write_to_an_open_file_is_named(tmp_path: Path, number: int) -> None:
    message = rf"^run\.directory = {re.escape(str(tmp_path))} cannot be written to: .*make room there or mend"
    with pytest.raises(RapoError, match=message), writing_to(tmp_path, "run.directory"):
        raise OSError(number, os.strerror(number))


def test_a_file_of_the_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "heartbeat").write_text("a file in the folder's place")
    with (
        pytest.raises(RapoError, match=r"Not a directory \(.*heartbeat/rank_00000"),
        writing_to(tmp_path, "run.directory"),
    ):
        (tmp_path / "heartbeat/rank_00000.json").write_text("")


def test_what_is_not_of_the_folder_passes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing_to(tmp_path / "run", "run.directory"):
        (tmp_path / "data.jsonl").read_text()
    with pytest.raises(ConnectionRefusedError), writing_to(tmp_path, "run.directory"):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with (
        pytest.raises(RapoError, match=r"--out = .*taken/run cannot be written to"),
        own_folder(tmp_path / "taken/run", "--out"),
    ):
        pytest.fail("written into a file")
