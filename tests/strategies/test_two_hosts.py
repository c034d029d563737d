"""A recipe trains over two hosts with torchrun and gloo: network namespaces joined by a virtual link.

Where the environment forbids namespaces, two loopback addresses stand for the hosts, and the output says so.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALLBACK = """
import json, os, pathlib
import lightning.pytorch as pl

class Tells(pl.Callback):
    def on_train_end(self, trainer, module):
        bits = {name: p.detach().numpy().tobytes().hex() for name, p in module.named_parameters()}
        strategy = trainer.strategy
        told = {"rank": trainer.global_rank, "node": trainer.node_rank, "world": trainer.world_size, "bits": bits}
        told |= {"steps": trainer.global_step, "strategy": type(strategy).__name__}
        told |= {"dense_bytes": 4 * sum(p.numel() for p in module.parameters())}
        pathlib.Path(os.environ["TELL"]).write_text(json.dumps(told))
"""


@pytest.fixture
def hosts(monkeypatch, capsys):
    """Two hosts."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _hosts

    reason = _hosts.why_no_namespaces()
    try:
        if reason is None:
            with _hosts.two_namespaces() as two:
                yield _hosts, two
            left = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
            assert not [host for host in two if host.prefix[-1] in left.split()]
        else:
            with capsys.disabled():
                print(f"\ntest_two_hosts: {reason}; two loopback addresses stand for the hosts.")
            yield _hosts, _hosts.two_addresses()
    finally:
        sys.modules.pop("_hosts", None)


def test_a_recipe_trains_over_two_hosts(hosts, tmp_path):
    _hosts, two = hosts
    (tmp_path / "tells.py").write_text(CALLBACK)
    words = ["-m", "lightning_opt.cli", "fit", "--trainer.strategy=ddp_econtrol", "--trainer.num_nodes=2"]
    words += ["--trainer.devices=1", "--trainer.accelerator=cpu", "--trainer.max_steps=30", "--report=false"]
    words += ["--trainer.callbacks+=tells.Tells", "--trainer.enable_progress_bar=false", "--test_after_fit=false"]
    words += ["--trainer.log_every_n_steps=10"]
    folders = [tmp_path / f"disk_{rank}" for rank in (0, 1)]  # two hosts need not share one
    before = [host.bytes_sent() for host in two]
    processes = []
    for rank, (host, folder) in enumerate(zip(two, folders, strict=True)):
        folder.mkdir()
        command = [*host.torchrun(rank, two[0].address, 29_517), *words, f"--trainer.default_root_dir={folder}"]
        with (tmp_path / f"{rank}.log").open("w") as log:
            environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TELL": str(folder / "told.json")}
            processes.append(host.start(command, log, environment, cwd=tmp_path))
    codes = _hosts.end(processes, 120)
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in (0, 1)]
    assert codes == [0, 0], "\n".join(logs)
    told = [json.loads((folder / "told.json").read_text()) for folder in folders]
    assert [(t["rank"], t["node"], t["world"], t["steps"]) for t in told] == [(0, 0, 2, 30), (1, 1, 2, 30)]
    assert {t["strategy"] for t in told} == {"EControlStrategy"}
    assert told[0]["bits"] == told[1]["bits"]
    assert list(folders[0].rglob("last.ckpt"))
    assert not list(folders[1].rglob("*.ckpt"))  # Lightning saves on rank 0

    # on the link: parameters once from host 0, gradients in full once, and then 1% of them with their places
    sent = [host.bytes_sent() - b for host, b in zip(two, before, strict=True)]
    dense = told[0]["dense_bytes"]
    assert dense < sent[1] < 5 * dense, f"{sent} bytes for gradients of {dense} bytes in 30 steps"
