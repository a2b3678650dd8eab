"""SIGTERM, SIGUSR1 and SIGINT as a request that the loop meets at the end of its step."""

import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from .command import is_local_main
from .errors import Stopped
from .parent import signal_at_parents_death

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE_REQUEST_S = 1.0  # what follows so soon is the same request: a terminal and a launcher both pass on Ctrl-C


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
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if isinstance(error, Stopped):  # the process ends, and its status is to say why whatever is sent meanwhile
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, now
            if is_local_main():
                again = "SIGTERM" if number == signal.SIGUSR1 else "the same signal again"
                said = f"{self.received}: saving at the end of this step; {again} stops at once\n"
                with suppress(OSError):
                    os.write(sys.stderr.fileno(), said.encode())  # print could be interrupted by itself
        elif number != signal.SIGUSR1 and now - self._received_at > ONE_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


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
    signal_at_parents_death(signal.SIGKILL)
