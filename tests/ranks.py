"""Processes of a run as a launcher would start them, but alone, so that nothing ends one when another has died.

They are forked from a process that has imported everything, which saves most of the time that a small run takes.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from conftest import TINY_PRETRAIN, arguments

PATIENCE_S = 150.0  # for whatever takes some seconds on an idle machine
LONG = TINY_PRETRAIN | {
    "steps": "100000",
    "optim.base_lr": "1e-4",
    "log_every_steps": "1",
    "save_every_steps": "100000",
    "stall_timeout_s": "6",
}  # a run that does not end by itself

FORK = """
import json, os, sys
from quarterlight.ssl.command import parse_config, run_command
from quarterlight.ssl.config import PretrainConfig
from quarterlight.ssl.pretrain import pretrain

for line in sys.stdin:
    job = json.loads(line)
    if os.fork():
        continue
    if pid := os.fork():  # one process waits for each, and writes down how it ended
        status = os.waitpid(pid, 0)[1]
        with open(job["output"] + ".partial", "w") as file:
            file.write(str(os.waitstatus_to_exitcode(status)))
        os.rename(job["output"] + ".partial", job["output"] + ".code")
        os._exit(0)
    os.setsid()
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT)
    for descriptor, where in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(where, descriptor)
    os.environ.update(job["environment"])
    sys.argv = ["a test", *job["words"]]
    with open(job["output"] + ".partial", "w") as file:
        file.write(str(os.getpid()))
    os.rename(job["output"] + ".partial", job["output"] + ".pid")
    exec(job["code"])
    break
"""
PRETRAIN = 'run_command(lambda: parse_config(PretrainConfig, ""), pretrain)'


@dataclass
class Rank:
    """A process of a run, whose output goes into a file."""

    pid: int
    output: Path

    def said(self) -> str:
        return self.output.read_text()

    def errors(self) -> list[str]:
        return [line for line in self.said().splitlines() if line.startswith("error: ")]

    def code(self) -> int | None:
        path = Path(f"{self.output}.code")
        return int(path.read_text()) if path.exists() else None

    def ended(self) -> int:
        """Waits for the end. Returns the exit code."""
        wait_until(lambda: self.code() is not None, shown=[self])
        return self.code()  # type: ignore[return-value]

    def workers(self) -> list[int]:
        """Returns the process ids of its data workers."""
        return [child.pid for child in psutil.Process(self.pid).children()]


class Nursery:
    """Starts the processes of runs."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen([sys.executable, "-c", FORK], stdin=subprocess.PIPE, env=environment, text=True)

    @contextmanager
    def run(self, count: int, options: dict[str, str], *, code: str = PRETRAIN) -> Iterator[list[Rank]]:
        """Starts pretraining, or other code, as `count` processes; kills what is left of them at the end."""
        ranks = []
        try:
            for environment in environments(count):
                ranks.append(self._start(code, arguments(options), environment))
            yield ranks
        finally:
            for rank in ranks:
                if rank.code() is None:
                    with suppress(ProcessLookupError):
                        os.kill(rank.pid, signal.SIGKILL)  # its data workers go with it

    def _start(self, code: str, words: list[str], environment: dict[str, str]) -> Rank:
        self.count += 1
        output = self.folder / f"output-{self.count}.txt"
        assert self.process.stdin is not None
        job = {"code": code, "words": words, "environment": environment, "output": str(output)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        pid = Path(f"{output}.pid")
        wait_until(pid.exists)
        return Rank(int(pid.read_text()), output)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def environments(count: int) -> list[dict[str, str]]:
    """Returns the environments of the processes of one machine, as torchrun sets them."""
    if count == 1:
        return [{}]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def steps_logged(run_dir: Path) -> int:
    """Returns the last step in metrics.jsonl."""
    try:
        return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def is_running(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait_until(
    what: Callable[[], bool], *, alive: Sequence[Rank] = (), shown: Sequence[Rank] = (), within_s: float = PATIENCE_S
) -> None:
    """Waits until something is so. Fails when it takes too long, or when a process of `alive` has ended."""
    deadline = time.monotonic() + within_s
    while not what():
        dead = [rank for rank in alive if rank.code() is not None]
        assert not dead, f"ended with {dead[0].code()}:\n{dead[0].said()[-4000:]}"
        assert time.monotonic() < deadline, "\n".join(rank.said()[-4000:] for rank in [*alive, *shown]) or "too slow"
        time.sleep(0.02)
