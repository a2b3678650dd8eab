"""SIGTERM, SIGUSR1 and SIGINT as a request that the loop meets at the end of its step."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from .command import is_local_main
from .errors import Stopped
from .parent import signal_at_parents_death

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE_REQUEST_S = 1.0  # what follows so soon is the same request: a terminal and a launcher both pass on Ctrl-C


class StopSignals:
    """Notes the first signal as `received`; the second one ends the process at once, whatever it waits for.

    SIGUSR1 never does: schedulers send it as a warning before SIGTERM, and it stands for the launcher's end here.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Python's handlers run between two steps of the main thread, and that may hang in a collective operation. So
        # the interpreter's own handler, in C, tells a thread, which is never busy.
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._pipe, self._wakeup_before = (reader, writer), signal.set_wakeup_fd(writer.fileno())
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        self._before = {number: signal.signal(number, _noted_by_the_thread) for number in REQUESTS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if isinstance(error, Stopped):  # the process ends, and its status is to say why whatever is sent meanwhile
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        for end in self._pipe:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # close alone would leave the thread waiting
            end.close()

    def _listen(self, reader: socket.socket) -> None:
        with suppress(OSError):
            while number := reader.recv(1):
                if number[0] in REQUESTS:
                    self._note(number[0])

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if self.received is None:
            self._received_at, self.received = now, signal.Signals(number).name
            if is_local_main():
                again = "SIGTERM" if number == signal.SIGUSR1 else "the same signal again"
                said = f"{self.received}: saving at the end of this step; {again} stops at once\n"
                with suppress(OSError):
                    os.write(sys.stderr.fileno(), said.encode())
        elif number != signal.SIGUSR1 and now - self._received_at > ONE_REQUEST_S:
            os._exit(128 + number)  # as shells call a process that died of it


def _noted_by_the_thread(number: int, frame: FrameType | None) -> None:
    del number, frame


@contextmanager
def ignored_by_children() -> Iterator[None]:
    """Has programs that are started meanwhile ignore what only the training process answers to."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in REQUESTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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

    signal.set_wakeup_fd(-1)  # a forked worker shares that of its training process
    signal.signal(signal.SIGTERM, on_term)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal_at_parents_death(signal.SIGKILL)
