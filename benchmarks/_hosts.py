"""Two hosts on one machine: network namespaces joined by a virtual link, or two loopback addresses."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple


class Host(NamedTuple):
    """One of two hosts.

    Attributes:
        address: By which the other reaches it.
        interface: That leads to the other.
        prefix: Words before a command that is to run there.
    """

    address: str
    interface: str
    prefix: tuple[str, ...]

    def start(
        self, words: list[str], log: IO[str], environment: Mapping[str, str] | None = None, **options: Any
    ) -> Any:
        """A process there, in a process group of its own."""
        own = {**os.environ, **(environment or {}), "GLOO_SOCKET_IFNAME": self.interface}
        return subprocess.Popen(
            [*self.prefix, *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=own,
            start_new_session=True,
            **options,
        )

    def torchrun(self, rank: int, master: str, port: int) -> list[str]:
        """The command that starts one process of a run over two hosts; what it runs follows."""
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
            *(
                f"--node-rank={rank}",
                f"--master-addr={master}",
                f"--master-port={port}",
                f"--local-addr={self.address}",
            ),
        ]

    def bytes_sent(self) -> int:
        """By the interface since it is there, headers included."""
        command = [*self.prefix, "cat", "/proc/net/dev"]
        return _bytes_sent(subprocess.run(command, check=True, capture_output=True, text=True).stdout, self.interface)


def interface_bytes() -> int:
    """What the interface of the host that this process runs on has sent."""
    return _bytes_sent(Path("/proc/net/dev").read_text(), os.environ["GLOO_SOCKET_IFNAME"])


def why_no_namespaces() -> str | None:
    """What forbids network namespaces here; None if nothing does."""
    if shutil.which("ip") is None:
        return "there is no command `ip`"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    name = f"probe-{os.getpid()}"
    made = _ip("netns", "add", name, check=False)
    if made.returncode != 0:
        return made.stderr.strip()
    _ip("netns", "del", name)
    return None


@contextlib.contextmanager
def two_namespaces(mbit: float | None = None) -> Iterator[tuple[Host, Host]]:
    """Two hosts with networks of their own and one link between them; both are gone afterwards.

    Args:
        mbit: Limits what each host can send to so many million bits a second, by a token bucket.
    """
    names, link = [f"host-{os.getpid()}-{i}" for i in (0, 1)], f"v{os.getpid()}"
    addresses = ("10.77.7.1", "10.77.7.2")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", f"{link}a", "netns", names[0], "type", "veth", "peer", f"{link}b", "netns", names[1])
        for name, interface, address in zip(names, (f"{link}a", f"{link}b"), addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
            _ip("-n", name, "link", "set", interface, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            if mbit is not None:
                _limit(name, interface, mbit)
        yield tuple(  # type: ignore[misc]
            Host(address, interface, ("ip", "netns", "exec", name))
            for name, interface, address in zip(names, (f"{link}a", f"{link}b"), addresses, strict=True)
        )
    finally:
        for name in names:  # the link goes with them
            pids = _ip("netns", "pids", name, check=False).stdout.split()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "del", name, check=False)


def two_addresses() -> tuple[Host, Host]:
    """Two addresses of this machine's loopback interface: one network, where two hosts would have two."""
    return Host("127.0.0.1", "lo", ()), Host("127.0.0.2", "lo", ())


def end(processes: list[Any], seconds: float, patience: float = 15) -> list[int | None]:
    """Wait, kill what is left, and return the exit statuses.

    Args:
        processes: That :meth:`Host.start` returned.
        seconds: For all.
        patience: For the others, once one has failed.
    """
    limit = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < limit:
            if any(process.poll() for process in processes):
                limit = min(limit, time.monotonic() + patience)
            time.sleep(0.02)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return [process.returncode for process in processes]


def _bytes_sent(table: str, interface: str) -> int:
    (line,) = (line for line in table.splitlines() if line.strip().startswith(f"{interface}:"))
    return int(line.partition(":")[2].split()[8])


def _limit(name: str, interface: str, mbit: float) -> None:
    """One packet at a time, none lost: what does not fit waits in the queue of the interface."""
    rate = [f"{mbit}mbit", "burst", "16kb", "limit", "4mb"]
    words = ["tc", "-n", name, "qdisc", "add", "dev", interface, "root", "tbf", "rate", *rate]
    subprocess.run(words, check=True, capture_output=True, text=True)


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)
