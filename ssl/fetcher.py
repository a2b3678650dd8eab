"""One process a node that fetches remote shards ahead of the run, and how the run holds it; `stock` is what it does.

It is a program of its own, `python -m quarterlight.ssl.fetcher`, so fsspec's thread and connections never meet a fork.
Its job comes pickled through stdin, then the run's positions, a line each. It ends with its parent, however that ends.
"""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from types import TracebackType

from .addresses import is_remote, shown
from .errors import InputError
from .patience import PATIENCE, Patience, unwritable
from .shard_cache import ShardCache
from .stock import Counts, Job, Stock, or_end

END = b"end\n"


class Fetcher:
    """Starts the process, tells it where the run is, and ends it; for one process a node.

    `plan` yields (position, shard), positions never falling, perhaps without end: the shard is in use from this
    position of the run until the run has reached the next greater one in the plan. A shard that is used for longer, or
    again, stands there again. The plan travels pickled. The cache holds at most `limit_bytes` of shards; those of runs
    that have ended count, and make room first. Raises InputError when a shard is larger than that.
    """

    def __init__(
        self,
        cache: ShardCache,
        plan: Iterable[tuple[int, int]],
        *,
        limit_bytes: int,
        patience: Patience = PATIENCE,
        parallel: int = 4,
    ) -> None:
        remote = [pair for pair in zip(cache.sizes, cache.urls, strict=True) if is_remote(pair[1])]
        size, url = max(remote, default=(0, ""))
        if size > limit_bytes:
            raise InputError(
                f"data.cache_gb is too little: {limit_bytes / 1e9:.3g} GB of it are for these shards, and {shown(url)} "
                f"alone has {size / 1e9:.3g} GB; give room for several shards"
            )
        self.process: subprocess.Popen[bytes] | None = None
        self._job = Job(cache, plan, limit_bytes, patience, parallel, os.getpid())

    def start(self) -> None:
        """Starts the process. Raises InputError when the cache cannot be written, or the process not started."""
        cache = self._job.cache
        try:
            cache.desk.mkdir(parents=True, exist_ok=True)
            cache.lock.touch()
        except OSError as error:
            raise unwritable(cache.folder, error) from error
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "quarterlight.ssl.fetcher"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            process_group=0,  # Ctrl-C is the parent's business
        )
        try:
            self._write(pickle.dumps(self._job))
        except BrokenPipeError as error:
            self.close()
            raise InputError(
                "the process that fetches shards ended at its start; its last words stand above"
            ) from error
        assert self.process.stdin
        os.set_blocking(self.process.stdin.fileno(), False)

    def advance(self, position: int) -> None:
        """Says that the run has reached `position`. Never waits; that the process died is told by the readers."""
        with contextlib.suppress(BrokenPipeError, BlockingIOError):  # when the pipe is full, a later position will do
            self._write(b"%d\n" % position)

    def close(self, *, timeout_s: float = 10.0) -> Counts:
        """Ends the process, with the downloads under way, and returns what it did (zeros when it did not say)."""
        if self.process is None:
            return Counts()
        process = self.process
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            self._write(END)  # workers that were forked hold the pipe too, so to close it may not be enough
        process.stdin.close()
        self.process = None
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with process.stdout:
            said = process.stdout.read()
        return Counts(**json.loads(said)) if said.endswith(b"}\n") else Counts()

    def _write(self, data: bytes) -> None:
        assert self.process and self.process.stdin, "the fetcher was not started"
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self.process.stdin.fileno(), rest) :]

    def __enter__(self) -> "Fetcher":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()


def main() -> None:
    """Runs the process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # a scheduler sends them to all processes of a job
        signal.signal(number, signal.SIG_IGN)
    stock = Stock(pickle.load(sys.stdin.buffer))
    threading.Thread(target=or_end, args=(stock.run,), daemon=True).start()
    for line in sys.stdin.buffer:
        if line == END:
            break
        stock.advance(int(line))
    stock.end()


if __name__ == "__main__":
    main()
