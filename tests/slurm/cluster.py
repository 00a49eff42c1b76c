"""A SLURM cluster of this machine alone: munge, a controller, and a node daemon a node, in a private folder.

Nothing is installed and nothing of the system's own SLURM is touched; all daemons end with the `with` block.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
# Debian keeps daemons in sbin, which is not in every PATH.
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])

CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until its old credential is void: two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
CompleteWait=0
SlurmdTimeout=10
{nodes}
PartitionName=test Nodes={names} Default=YES State=UP
"""


def missing_programs() -> list[str]:
    """The programs that a cluster needs and this machine does not have."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Cluster:
    """Nodes n1, n2, …, all on 127.0.0.1, with two CPUs each."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Self:
        (self.folder / "state").mkdir()
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        ports = free_ports(len(self.nodes) + 1)
        lines = [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000"
            for name, port in zip(self.nodes, ports[1:], strict=True)
        ]
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                user=getpass.getuser(),
                folder=self.folder,
                port=ports[0],
                nodes="\n".join(lines),
                names=",".join(self.nodes),
            )
        )
        try:
            self._start_munge()
            self._start("slurmctld", "-D", "-c")
            for node in self.nodes:
                self.start_node(node)
            self.wait_until(lambda: self.sinfo().count("idle") == len(self.nodes), 30, "nodes are idle")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
            self.command("scancel", "--state=RUNNING")
            self.command("scancel", "--state=PENDING")
            self.wait_until(lambda: not self.command("squeue", "--noheader").strip(), 20, "jobs have ended")
        self._stop()

    def command(self, *arguments: str) -> str:
        """Runs one of SLURM's programs against this cluster; its output."""
        result = subprocess.run(
            arguments, env=self.environment, capture_output=True, text=True, timeout=60, check=True
        )
        return result.stdout

    def sinfo(self) -> list[str]:
        """Each node's state."""
        return self.command("sinfo", "--noheader", "--Node", "--format=%T").split()

    def job(self, number: int) -> dict[str, str]:
        """What scontrol tells of a job, by its words: JobState, Restarts, NodeList, …"""
        words = self.command("scontrol", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_node(self, node: str) -> None:
        """Starts a node's daemon."""
        self._start("slurmd", "-D", "-N", node, name=node)

    def lose_node(self, node: str) -> None:
        """Ends a node at once, with all that runs on it, as when its power fails."""
        daemon = self._daemons.pop(node)
        # The steps' daemons are no children of the node's: they are known by its spool folder.
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("SLURMD_NODENAME") == node or self._steps_of(node, process):
                    process.kill()
        daemon.kill()
        daemon.wait(10)
        self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power")

    def wait_until(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """Waits until the condition holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout} s: {what}\n{self.diagnosis()}"
            time.sleep(0.2)

    def diagnosis(self) -> str:
        """Where jobs and nodes stand, with the ends of the daemons' logs."""
        with suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
            print(self.command("squeue", "--long"), self.command("sinfo", "--long", "--Node"))
        return "\n".join(f"{log}:\n{log.read_text()[-1500:]}" for log in sorted(self.folder.glob("*.log")))

    def _steps_of(self, node: str, process: psutil.Process) -> bool:
        return process.name() == "slurmstepd" and f"spool-{node}" in " ".join(
            file.path for file in process.open_files()
        )

    def _start_munge(self) -> None:
        options = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid"}
        options |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        arguments = [f"--{option}={self.folder / file}" for option, file in options.items()]
        self._start("munged", "--foreground", "--force", *arguments)
        self.wait_until((self.folder / "munge.socket").exists, 10, "munge listens")

    def _start(self, program: str, *arguments: str, name: str | None = None) -> None:
        output = (self.folder / f"{name or program}.out").open("ab")
        with output:
            self._daemons[name or program] = subprocess.Popen(
                [program, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.folder,
            )

    def _stop(self) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in reversed(self._daemons.values()):
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait(10)
