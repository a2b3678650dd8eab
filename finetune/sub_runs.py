"""Other commands as processes: run to their end, stopped with this one, their results read."""

import json
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quarterlight.ssl.errors import InputError, Stopped
from quarterlight.ssl.signals import StopSignals

POLL_S = 0.2


def run_to_its_end(command: Sequence[str], folder: Path, signals: StopSignals) -> None:
    """Runs a command to its end, its output in a file beside its run folder.

    A signal to this process is passed on, and the end of the command awaited. Raises Stopped then, and InputError with
    what the command said when it fails.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(folder.name + ".txt")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        told = False
        while process.poll() is None:
            time.sleep(POLL_S)
            if signals.received is not None and not told:
                process.send_signal(signal.SIGTERM)
                told = True
    if signals.received is not None or process.returncode == Stopped.EXIT_STATUS:
        raise Stopped("stopped by a signal")
    if process.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
        raise InputError(f"the command failed ({said.removeprefix('error: ')}); its output is in {log}")


def finished_result(folder: Path) -> dict[str, Any] | None:
    """Returns what a finished run has left; None: it is not finished."""
    try:
        found = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return None
    return found if found.get("finished") else None
