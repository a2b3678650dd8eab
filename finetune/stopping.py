"""Work without a training loop that ends in good order: on a signal, and when a process dies or hangs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator

from quarterlight.ssl.errors import Stopped
from quarterlight.ssl.signals import StopSignals
from quarterlight.ssl.watch import Watch

STALL_TIMEOUT_S = 900.0  # where no option gives it


@contextmanager
def stoppable(
    accelerator: Accelerator, leave: Callable[[StopSignals], None], stall_timeout_s: float = STALL_TIMEOUT_S
) -> Iterator[StopSignals]:
    """Gives the signals to look at (`until_stopped` does), under a watch over all processes.

    When Stopped is raised inside, the main process calls `leave(signals)` before it goes on.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    with StopSignals() as signals, Watch(rank, world_size, stall_timeout_s, lambda: "") as watch:
        try:
            with watch.during("evaluating"):
                yield signals
        except Stopped:
            if accelerator.is_main_process:
                leave(signals)
            raise
