"""SIGTERM, SIGUSR1 and SIGINT as a request that the loop meets at the end of its step."""

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from .command import is_local_main

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE_REQUEST_S = 1.0  # what follows so soon is the same request: a terminal and a launcher both pass on Ctrl-C
LAUNCHERS = (b"accelerate", b"torchrun", b"torch.distributed")


class StopSignals:
    """Notes the first signal as `received`; the second one ends the process at once.

    SIGUSR1 never does: schedulers send it as a warning before SIGTERM, and it stands for the launcher's end here.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._handle) for number in REQUESTS}
        follow_launcher()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, now
            if is_local_main():
                said = f"{self.received}: saving at the end of this step; the same signal again stops at once\n"
                with suppress(OSError):
                    os.write(sys.stderr.fileno(), said.encode())  # print could be interrupted by itself
        elif number != signal.SIGUSR1 and now - self._received_at > ONE_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def follow_launcher() -> None:
    """Has the kernel send SIGUSR1 when a launcher that started this process ends (Linux only).

    accelerate's launcher of one process dies of SIGTERM without a word to the process, which would go on unnoticed; so
    would those of any launcher that is killed. Started from a shell a process is left alone, since nohup is meant.
    """
    with suppress(OSError):
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
        if any(launcher in command for launcher in LAUNCHERS):
            _at_parents_death(signal.SIGUSR1)


def _at_parents_death(number: signal.Signals) -> None:
    """Has the kernel send this process a signal when its parent ends (Linux only)."""
    if sys.platform.startswith("linux"):
        set_parent_death_signal = 1
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(set_parent_death_signal, int(number), 0, 0, 0)


def leave_signals_to_parent() -> None:
    """Makes a data worker ignore what its training process answers to, and end with it, even while it hangs.

    A terminal and SLURM send a signal to all processes of a job, and a worker that died of it would leave the step
    unfinished. Torch ends its workers by a flag, and by SIGTERM where they hang: so the second one counts.
    """
    first = True

    def on_term(number: int, frame: FrameType | None) -> None:
        nonlocal first
        del frame
        if not first:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        first = False

    signal.signal(signal.SIGTERM, on_term)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    _at_parents_death(signal.SIGKILL)
