"""A rank is killed with SIGKILL: the other ends by itself with a clear error, and the last checkpoint resumes exactly.

``benchmarks/resume_kill.py --ranks 2`` does the same to whole recipes, at random steps.
"""

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import TensorDataset

import lightning_opt  # noqa: F401  # gives the strategies their names
from lightning_opt.callbacks import ResumeState
from lightning_opt.data import ResumableLoader
from lightning_opt.testing._strategy_checks.problem import Problem, data

STEPS, KILL_AT = 12, 8  # 6 steps an epoch, a checkpoint every 3


class Kills(pl.Callback):
    """Ends the process within a step, when its gradient is there and the others wait for nothing yet."""

    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step == KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def train(rank, port, strategy, folder, ckpt_path, victim):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=STEPS,
        callbacks=[
            ResumeState(),
            ModelCheckpoint(folder, every_n_train_steps=3, save_last=True),
            *([Kills()] if rank == victim else []),
        ],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module, loader = Problem(), ResumableLoader(TensorDataset(*data()), 4, shuffle=True, seed=1)
    try:
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    except BaseException as error:
        (folder / f"error_{rank}.txt").write_text(str(error))
        os._exit(3)
    torch.save(dict(module.named_parameters()), folder / f"parameters_{rank}.pt")
    os._exit(0)  # without a word to the other, as the process group's own end would say


def start(strategy, folder, ckpt_path=None, victim=None):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "lightning_opt.testing.check_strategy"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        context.Process(target=train, args=(rank, port, strategy, folder, ckpt_path, victim), daemon=True)
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    return ranks


def end(ranks, seconds=60):
    limit = time.monotonic() + seconds
    for process in ranks:
        process.join(max(limit - time.monotonic(), 0))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return codes


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_and_the_last_checkpoint_resumes_exactly(victim, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    strategy = "ddp_econtrol"
    both = [*start(strategy, whole), *start(strategy, killed, victim=victim)]
    codes = end(both)
    expected = {victim: -signal.SIGKILL, 1 - victim: 3}
    assert codes == [0, 0, expected[0], expected[1]]
    assert "A rank did not arrive, or is gone" in (killed / f"error_{1 - victim}.txt").read_text()

    checkpoint = Path(killed, "last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 6
    assert end(start(strategy, killed, ckpt_path=checkpoint)) == [0, 0]
    for rank in (0, 1):
        file = f"parameters_{rank}.pt"
        resumed, uninterrupted = torch.load(killed / file), torch.load(whole / file)
        assert resumed.keys() == uninterrupted.keys()
        assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)
