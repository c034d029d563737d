"""Two processes that know each other as the ranks of one run."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (port, folder, function, argument), nprocs=2)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(2)]


def _rank(rank: int, port: int, folder: str, function: Callable[[Any], Any], argument: Any) -> None:
    # where Lightning finds LOCAL_RANK it starts no processes of its own
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    torch.save(function(argument), Path(folder, f"{rank}.pt"))
    if dist.is_initialized():
        dist.destroy_process_group()
