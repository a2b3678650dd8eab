"""Two machines on this one: network namespaces of their own names, joined by a switch whose cable can be pulled out.

Nothing that happens in them reaches a real network. Needs root and iproute2.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
ENTER = """
mount --make-rprivate / && mount --bind "$1" /etc/hosts && hostname "$2" || exit 99
[ -z "$3" ] || mount -t tmpfs none "$3" || exit 99
shift 3 && exec "$@"
"""  # for bash: in namespaces of its own, whose changes nobody else sees


class Hosts:
    """The two machines. Their processes are those of `words(machine, command)`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"quarterlight-{os.getpid()}-{name}" for name in ("0", "1", "switch")]
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{address} machine{i}" for i, address in enumerate(ADDRESSES))]
        (folder / "hosts").write_text("".join(f"{line}\n" for line in lines))

    def words(self, machine: int, command: list[str], *, hidden: Path | None = None) -> list[str]:
        """Returns the command line that runs `command` on a machine, where `hidden` is another, empty folder."""
        enter = ["ip", "netns", "exec", self.names[machine], "unshare", "--uts", "--mount", "bash", "-c", ENTER, "-"]
        return [*enter, str(self.folder / "hosts"), f"machine{machine}", str(hidden or ""), *command]

    def cut(self) -> None:
        """Pulls out the cable of machine 1: neither side is told by the other."""
        _ip("-n", self.names[2], "link", "set", "port1", "down")

    def mend(self) -> None:
        _ip("-n", self.names[2], "link", "set", "port1", "up")

    def open(self) -> None:
        for name in _left_behind():
            _remove(name)
        *machines, switch = self.names
        for name in self.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for i, (name, address) in enumerate(zip(machines, ADDRESSES, strict=True)):
            ends = ["link", "add", "eth0", "type", "veth", "peer", "name", f"port{i}", "netns", switch]
            _ip("-n", name, *ends)
            _ip("-n", switch, "link", "set", f"port{i}", "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")

    def close(self) -> None:
        """Ends whatever runs on the machines, and removes them."""
        for name in self.names:
            _remove(name)


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Yields two machines, which are gone at the end, also where the program is asked to end before."""
    hosts = Hosts(folder)
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        hosts.open()
        yield hosts
    finally:
        hosts.close()
        signal.signal(signal.SIGTERM, before)


def why_not() -> str:
    """Returns why this machine cannot be two, or ""."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "unshare", "bash", "mount"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    name = f"quarterlight-{os.getpid()}-try"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "bridge", "type", "bridge")
        _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "port")
        subprocess.run(
            ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "mount", "--make-rprivate", "/"],
            check=True,
            capture_output=True,
            text=True,
        )
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return ""


def _remove(name: str) -> None:
    """Ends whatever runs in a namespace, and removes it."""
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _left_behind() -> list[str]:
    """Returns the namespaces of programs that were killed."""
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
    ours = [name for name in names if re.fullmatch(r"quarterlight-\d+-\w+", name)]
    return [name for name in ours if not Path(f"/proc/{name.split('-')[1]}").exists()]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
