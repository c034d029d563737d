"""Two processes that know each other as the ranks of one run."""

import io
import os
import socket
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

_START_SECONDS = 300  # imports, on a busy machine


class TwoRanks:
    """Two processes that stay, for one call after another; a Trainer with two CPU devices in a call joins them.

    The first call starts them. A rank that does not answer ends both, and the next call starts two new ones.

    Args:
        timeout: Seconds that a call may take, once the processes are there.
        patience: Seconds that a rank may take longer than the other.

    Cost:
        Two processes that import torch and Lightning: seconds. As with all of multiprocessing, a script that uses this
        needs ``if __name__ == "__main__":``.

    Example:
        >>> if __name__ == "__main__":
        ...     with TwoRanks() as ranks:
        ...         print(ranks.call(os.path.basename, "a/b"))  # ['b', 'b']
    """

    def __init__(self, timeout: float = 180, patience: float = 30) -> None:
        self.timeout, self.patience = timeout, patience
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(*arguments)`` returns on rank 0 and on rank 1.

        Args:
            function: Importable by name; what it returns must be what ``torch.load(weights_only=True)`` reads. It must
                not raise.
            *arguments: Anything that can be pickled.

        Raises:
            TimeoutError: If a rank does not answer in time, or ended.
        """
        if not self._processes:
            self._start()
        answers: list[Any] = [None, None]
        try:
            for pipe in self._pipes:
                pipe.send((function, arguments))
            end = time.monotonic() + self.timeout
            waiting = {0, 1}
            while waiting:
                for rank in sorted(waiting):
                    if self._pipes[rank].poll(0.01):
                        answers[rank] = torch.load(io.BytesIO(self._pipes[rank].recv_bytes()), weights_only=True)
                        waiting.discard(rank)
                        end = min(end, time.monotonic() + self.patience)
                if waiting and time.monotonic() > end:
                    raise TimeoutError(f"rank {min(waiting)} does not answer; {_told(answers)}")
        except (EOFError, ConnectionError) as error:
            self.close()
            raise TimeoutError(f"a rank ended within the call; {_told(answers)}") from error
        except BaseException:
            self.close()
            raise
        return answers

    def close(self) -> None:
        """End both processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def __enter__(self) -> "TwoRanks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        port = _free_port()
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, there), name=f"TwoRanks-{rank}", daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_START_SECONDS):
                self.close()
                raise TimeoutError(f"rank {rank} does not start in {_START_SECONDS} s")
            pipe.recv()


def on_two_ranks(function: Callable[[Any], Any], argument: Any) -> list[Any]:
    """Call ``function(argument)`` in two new processes; a Trainer with two CPU devices in it joins them.

    Args:
        function: Importable by name; what it returns must be what ``torch.load(weights_only=True)`` reads.
        argument: Anything that can be pickled.

    Returns:
        What it returned, on rank 0 and on rank 1.

    Cost:
        Two processes that import torch and Lightning: seconds. As with all of multiprocessing, a script that calls
        this needs ``if __name__ == "__main__":``.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (port, folder, function, argument), nprocs=2)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(2)]


def _rank(rank: int, port: int, folder: str, function: Callable[[Any], Any], argument: Any) -> None:
    _become(rank, port)
    torch.save(function(argument), Path(folder, f"{rank}.pt"))
    if dist.is_initialized():
        dist.destroy_process_group()


def _serve(rank: int, port: int, pipe: Connection) -> None:
    """Answer calls until the other end of the pipe is closed."""
    import lightning_opt.testing.check_strategy  # noqa: F401  # what nearly every call needs

    _become(rank, port)
    pipe.send("ready")
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        file = io.BytesIO()
        torch.save(function(*arguments), file)
        pipe.send_bytes(file.getvalue())


def _become(rank: int, port: int) -> None:
    # where Lightning finds LOCAL_RANK it starts no processes of its own
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _told(answers: list[Any]) -> str:
    """What came of the ranks that answered."""
    told = {rank: answer for rank, answer in enumerate(answers) if answer is not None}
    errors = {rank: a["error"] for rank, a in told.items() if isinstance(a, dict) and "error" in a}
    if errors:
        return "; ".join(f"rank {rank} raised {error}" for rank, error in errors.items())
    return f"rank {', '.join(map(str, told))} came to its end" if told else "nor does the other"
