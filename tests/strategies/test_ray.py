"""The example of docs/distributed.md runs under Ray Train with two workers; so does a strategy without gradients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]

# In place of the example's last lines: the same, in a small local cluster, and another strategy behind it.
MAIN = """
from lightning_opt.strategies import CBOStrategy


class RayCBOStrategy(CBOStrategy, RayDDPStrategy):
    pass


def train_both(config):
    train(config)
    trainer = prepare_trainer(
        pl.Trainer(
            strategy=RayCBOStrategy(n_particles=8, vectorize="never"),
            plugins=[RayLightningEnvironment()],
            accelerator="cpu",
            max_steps=2,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
    )
    model = Model(MLP(64, (8,)))
    trainer.fit(model, Digits(batch_size=32))
    bits = {name: p.detach().numpy().tobytes().hex() for name, p in model.named_parameters()}
    told = {"world": trainer.world_size, "steps": trainer.global_step, "bits": bits}
    with open(os.path.join(config["folder"], f"{trainer.global_rank}.json"), "w") as file:
        json.dump(told, file)


if __name__ == "__main__":
    import json

    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        TorchTrainer(
            train_both,
            train_loop_config={"epochs": 1, "folder": os.getcwd()},
            scaling_config=ScalingConfig(num_workers=2),
            torch_config=TorchConfig(backend="gloo"),
            run_config=RunConfig(storage_path=os.path.abspath("ray_results")),
        ).fit()
    finally:
        ray.shutdown()
"""


def test_the_documented_example_and_a_strategy_without_gradients(tmp_path):
    page = (ROOT / "docs" / "distributed.md").read_text()
    example = page.partition("```python\n")[2].partition("```")[0]
    definitions, main, _ = example.partition('if __name__ == "__main__":')
    assert main
    script = tmp_path / "example.py"
    script.write_text(definitions + MAIN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    environment["RAY_raylet_start_wait_time_s"] = "300"  # on a busy machine
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    (checkpoint,) = tmp_path.glob("ray_results/**/checkpoint.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    first, second = saved["compression"]["ranks"]  # the errors that each of two ranks remembers
    assert any(not torch.equal(first[name]["error"], second[name]["error"]) for name in first)
    assert saved["callbacks"]["ResumeState"]["world_size"] == 2

    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [(t["world"], t["steps"]) for t in told] == [(2, 2), (2, 2)]
    assert told[0]["bits"] == told[1]["bits"]
