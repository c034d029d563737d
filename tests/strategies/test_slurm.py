"""With the variables that ``srun`` sets, a task of SLURM finds its place in the run."""

import lightning.pytorch as pl
import pytest
from lightning.pytorch.plugins.environments import SLURMEnvironment

import lightning_opt  # noqa: F401  # gives the strategies their names


@pytest.mark.parametrize("strategy", ["ddp_econtrol", "cbo"])
def test_a_task_knows_its_rank_and_the_address_of_the_first(strategy, monkeypatch):
    of_the_job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    of_the_task = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_NODELIST": "host[1-2]"}
    for name, value in {**of_the_job, **of_the_task}.items():
        monkeypatch.setenv(name, value)
    trainer = pl.Trainer(strategy=strategy, num_nodes=2, devices=1, accelerator="cpu", logger=False)
    environment = trainer.strategy.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert environment.creates_processes_externally  # no process of Lightning's beside SLURM's
    assert (trainer.global_rank, trainer.world_size, environment.main_address) == (1, 2, "host1")
