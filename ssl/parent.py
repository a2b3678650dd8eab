"""What a process does when the one that started it ends. The kernel tells it, on Linux."""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

LAUNCHERS = (b"accelerate", b"torchrun", b"torch.distributed")


def follow_launcher() -> None:
    """Has SIGUSR1 sent when a launcher that started this process ends: it asks for the run's end, see `StopSignals`.

    accelerate's launcher of one process dies of SIGTERM without a word to the process, which would go on unnoticed; so
    would those of any launcher that is killed. Started from a shell a process is left alone, since nohup is meant.
    """
    with suppress(OSError):
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
        if any(launcher in command for launcher in LAUNCHERS):
            signal_at_parents_death(signal.SIGUSR1)


def signal_at_parents_death(number: signal.Signals) -> None:
    """Has the kernel send this process a signal when its parent ends."""
    if not sys.platform.startswith("linux"):
        return
    set_parent_death_signal, parent = 1, os.getppid()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it has ended meanwhile
            os.kill(os.getpid(), number)
