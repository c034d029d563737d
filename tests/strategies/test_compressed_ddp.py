"""Compressed strategies under the Trainer, on two gloo ranks: one pair of processes for all of it."""

import csv
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import FSDPPrecision, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_opt  # noqa: F401  # registers the names
from lightning_opt.compression import (
    CompressionState,
    Identity,
    QuantizeInt8,
    RandK,
    ScaledSign,
    TopK,
    compressed_allreduce_hook,
)
from lightning_opt.strategies import EControlStrategy, EF14Strategy, EF21Strategy, NaiveCompressionStrategy
from lightning_opt.strategies._compressed_ddp import CompressedDDPStrategy
from lightning_opt.testing._ranks import on_two_ranks
from tests.reference import error_feedback as reference

settings = {
    "EControlStrategy": {"process_group_backend": "gloo"},
    "EF14Strategy": {},
    "EF21Strategy": [{"weights": "auto"}, {"momentum": 0.1, "init": "zeros"}],
    "NaiveCompressionStrategy": {},
}

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
STEPS = 12


class Regression(pl.LightningModule):
    """Least squares with one vector of weights; each rank has data of its own."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.w = nn.Parameter(torch.ones(20))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return 0.5 * (batch[0] @ self.w - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Small(pl.LightningModule):
    """A small network; ``unused`` gives it a layer that no loss reaches."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 3))
            self.unused = nn.Linear(20, 20) if unused else None
        self.path: list[Tensor] = []
        self.fail_at: int | None = None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == self.fail_at:
            raise RuntimeError("this rank fails")
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.path.append(weights(self))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.5)


def weights(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def regression_data(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(40, 20, generator=generator, dtype=torch.float64) * (1 + 2 * rank)
    return x, torch.randn(40, generator=generator, dtype=torch.float64)


def classes_loader(rank: int, batch: int = 16, steps: int = STEPS) -> DataLoader:
    """Without a sampler of Lightning's: each rank reads its own data in order."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(16 * STEPS, 20, generator=generator)
    y = (x[:, :3] + torch.arange(3) * rank).argmax(1)
    return DataLoader(TensorDataset(x[: batch * steps], y[: batch * steps]), batch)


def fit(module: pl.LightningModule, strategy: Any, data: DataLoader, ckpt: Any = None, **options: Any) -> pl.Trainer:
    options = {"logger": False, "enable_checkpointing": False, "max_epochs": 1, **QUIET, **options}
    trainer = pl.Trainer(strategy=strategy, devices=2, use_distributed_sampler=False, **options)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    return trainer


def error_of(*args: Any, **options: Any) -> str:
    try:
        fit(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def warnings_of(strategy: Any, rank: int) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Small(), strategy, classes_loader(rank, steps=1))
    return "\n".join(str(w.message) for w in caught)


def on_rank(folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    rank = int(os.environ["LOCAL_RANK"])
    results: dict[str, Any] = {}
    results["papers"] = {name: regression(rank, make()) for name, make in PAPERS.items()}
    dense, identity, ef21 = Small(), Small(), Small()
    fit(dense, DDPStrategy(), classes_loader(rank))
    fit(identity, EF21Strategy(Identity()), classes_loader(rank))
    trainer = fit(ef21, EF21Strategy(TopK(0.1)), classes_loader(rank))
    results["dense"], results["identity"], results["ef21"] = map(stacked, (dense, identity, ef21))
    results["memory"] = trainer.strategy.state.local_state()
    results["shared"] = trainer.strategy.state.shared_state()["mean_estimate"]

    small = Small()
    fit(small, EF21Strategy(TopK(0.1), bucket_cap_mb=1e-3, gradient_as_bucket_view=True), classes_loader(rank))
    results["small buckets"] = stacked(small)

    results["resumed"] = {name: resume(rank, make, Path(folder, name)) for name, make in RESUMED.items()}
    results["ranks changed"] = change_ranks(rank, Path(folder))
    results["accumulated"] = accumulate(rank)

    clipped = Small()
    fit(clipped, EControlStrategy(TopK(0.1)), classes_loader(rank), gradient_clip_val=1e-3)
    results["clipped"] = stacked(clipped)
    results["amp"] = mixed_precision(rank)
    results["logs"] = logs(rank, Path(folder, "logs"))
    results["names"] = names(rank)

    results["unused refused"] = error_of(Small(unused=True), EF21Strategy(), classes_loader(rank))
    spare = Small(unused=True)
    fit(spare, EF21Strategy(find_unused_parameters=True), classes_loader(rank))
    results["unused"] = stacked(spare)
    results["warnings"] = warnings_of(EControlStrategy(TopK(0.9), eta=1.0, error_dtype="bfloat16"), rank)
    results["large eta"] = warnings_of(EControlStrategy(TopK(0.1), eta=0.5), rank)
    results["three weights"] = error_of(Small(), EF21Strategy(weights=[0.2, 0.3, 0.5]), classes_loader(rank))
    results["sparse"] = error_of(Sparse(), EF21Strategy(), classes_loader(rank))

    last = Small()
    last.fail_at = 3 if rank == 1 else None
    results["gone"] = error_of(last, EF21Strategy(TopK(0.1)), classes_loader(rank))  # the last: ends the group
    return results


def stacked(module: Small) -> Tensor:
    return torch.stack(module.path)


# --- what runs on the ranks ------------------------------------------------------------------------------------------

PAPERS = {
    "ef21": lambda: EF21Strategy(TopK(k=2), min_numel=1),
    "ef21_w": lambda: EF21Strategy(TopK(k=2), min_numel=1, weights=[0.2, 0.8]),
    "sgdm": lambda: EF21Strategy(TopK(k=2), min_numel=1, momentum=0.3),
    "econtrol": lambda: EControlStrategy(TopK(k=2), min_numel=1),
    "ef14": lambda: EF14Strategy(TopK(k=2), min_numel=1),
    "naive": lambda: NaiveCompressionStrategy(TopK(k=2), min_numel=1),
}
RESUMED = {
    "ef21": lambda: EF21Strategy(TopK(0.1), momentum=0.2),
    "ef21_w": lambda: EF21Strategy(QuantizeInt8(step=1e-3), weights="auto"),
    "econtrol": lambda: EControlStrategy(RandK(0.1)),
    "ef14": lambda: EF14Strategy(ScaledSign(), error_dtype="bfloat16"),
}


def test_weights_of_the_ranks_are_those_of_the_checkpoint(monkeypatch) -> None:
    state = CompressionState("ef21", TopK(k=2), weights=[0.2, 0.8], world_size=2)
    state.step = 3
    monkeypatch.setattr(CompressedDDPStrategy, "make_state", lambda self: state)
    with pytest.warns(UserWarning, match=r"goes on with the ranks' weights of the checkpoint, \[0.2, 0.8\]"):
        assert EF21Strategy(weights=[0.5, 0.5]).make_state().weights == [0.2, 0.8]


def regression(rank: int, strategy: Any) -> Tensor:
    module = Regression()
    loader = DataLoader(TensorDataset(*regression_data(rank)), 40)
    fit(module, strategy, loader, precision="64-true", max_epochs=30)
    return module.w.detach()


def resume(rank: int, make: Any, folder: Path) -> dict[str, Tensor]:
    whole, resumed = Small(), Small()
    checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(whole, make(), classes_loader(rank), enable_checkpointing=True, callbacks=[checkpoint], max_epochs=2)
    trainer = fit(resumed, make(), classes_loader(rank), ckpt=folder / "epoch=0.ckpt", max_epochs=2)
    state = torch.load(folder / "epoch=0.ckpt", weights_only=True)["compression"]
    return {
        "whole": weights(whole),
        "resumed": weights(resumed),
        "ranks": torch.tensor(len(state["ranks"])),
        "step": torch.tensor([state["shared"]["step"], trainer.strategy.state.step]),
    }


def change_ranks(rank: int, folder: Path) -> dict[str, Any]:
    """A checkpoint of three ranks, made of one of two."""
    path, changed = folder / "econtrol" / "epoch=0.ckpt", folder / f"three_{rank}.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["compression"]
    state["ranks"].append(state["ranks"][0])
    state["shared"]["world_size"] = 3
    torch.save(checkpoint, changed)
    refused = error_of(Small(), EControlStrategy(RandK(0.1)), classes_loader(rank), ckpt=changed, max_epochs=2)
    other = error_of(Small(), EF21Strategy(RandK(0.1)), classes_loader(rank), ckpt=path, max_epochs=2)
    module, strategy = Small(), EControlStrategy(RandK(0.1), on_world_size_change="mean")
    fit(module, strategy, classes_loader(rank), ckpt=changed, max_epochs=2)
    return {"refused": refused, "other": other, "weights": weights(module), "step": strategy.state.step}


def accumulate(rank: int) -> dict[str, Tensor]:
    parts, whole = Small(), Small()
    for module, batch, steps, n in ((parts, 16, STEPS, 2), (whole, 32, STEPS // 2, 1)):
        options = {"precision": "64-true", "accumulate_grad_batches": n}
        fit(module, EF21Strategy(TopK(0.1)), classes_loader(rank, batch, steps), **options)
    return {"parts": weights(parts), "whole": weights(whole)}


def mixed_precision(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    module = Small()
    fit(module, EControlStrategy(TopK(0.1)), classes_loader(rank), precision="bf16-mixed")
    results["bf16"] = weights(module)
    for name, scale in (("fp16", 2.0**10), ("overflow", 2.0**40)):
        module = Small()
        before = weights(module)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        trainer = fit(module, EF21Strategy(TopK(0.1)), classes_loader(rank, steps=2), plugins=[plugin])
        state = trainer.strategy.state
        results[name] = {
            "moved": weights(module) - before,
            "scale": torch.tensor(scaler.get_scale()),
            "remembered": torch.tensor(len(state.memory)),
            "skipped": state.skipped,
            "estimates": torch.cat([m.estimate for m in state.memory.values() if m.estimate is not None] or [before]),
        }
    plain = Small()
    trainer = fit(plain, EF21Strategy(TopK(0.1)), classes_loader(rank, steps=2))
    memory = trainer.strategy.state.memory.values()
    results["fp32 estimates"] = torch.cat([m.estimate for m in memory if m.estimate is not None])
    return results


def logs(rank: int, folder: Path) -> dict[str, Any]:
    logger = CSVLogger(folder)
    trainer = fit(Small(), EControlStrategy(TopK(0.1)), classes_loader(rank), logger=logger, log_every_n_steps=STEPS)
    lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines() if rank == 0 else []
    rows = list(csv.DictReader(lines))
    values = {k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith("comm/")}
    return {"values": values, "rows": [{k: row.get(k, "") for k in ("step", *values)} for row in rows]}


def names(rank: int) -> dict[str, str]:
    found = {}
    for name in ("ddp_ef21", "ddp_ef21_sgdm", "ddp_ef21_w", "ddp_econtrol", "ddp_ef14", "ddp_topk_naive"):
        trainer = fit(Small(), name, classes_loader(rank, steps=2))
        found[name] = f"{type(trainer.strategy).__name__} {trainer.strategy.state.step}"
    return found


class Sparse(Small):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 2, sparse=True)


# --- what is asked of it ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return on_two_ranks(on_rank, str(tmp_path_factory.mktemp("ranks")))


def test_the_ranks_have_the_same_weights_bit_for_bit(ranks):
    first, second = ranks
    for name in ("identity", "ef21", "small buckets", "clipped", "unused"):
        assert torch.equal(first[name], second[name]), name
    for name in PAPERS:
        assert torch.equal(first["papers"][name], second["papers"][name])
    assert torch.equal(first["amp"]["bf16"], second["amp"]["bf16"])
    assert all(torch.equal(value, second["shared"][name]) for name, value in first["shared"].items())


def test_two_ranks_do_what_the_papers_say(ranks):
    """In float64 to 1e-12; the issue asks for 1e-6."""

    def gradient(i: int, w: np.ndarray) -> np.ndarray:
        x, y = (t.numpy() for t in regression_data(i))
        return x.T @ (x @ w - y) / len(x)

    common = gradient, np.ones(20), 2, 2, 0.05, 30
    expected = {
        "ef21": reference.ef21(*common),
        "ef21_w": reference.ef21_w(gradient, np.ones(20), [0.2, 0.8], 2, 0.05, 30),
        "sgdm": reference.ef21_sgdm(*common, 0.3),
        "econtrol": reference.econtrol(*common, 0.1),
        "ef14": reference.ef14(*common),
        "naive": reference.naive(*common),
    }
    for name, path in expected.items():
        scale = np.abs(path).max()
        np.testing.assert_allclose(ranks[0]["papers"][name], path[-1], rtol=0, atol=1e-12 * scale, err_msg=name)
    ends = torch.stack([ranks[0]["papers"][name] for name in ("ef21", "sgdm", "econtrol", "ef14", "naive")])
    assert torch.cdist(ends, ends).fill_diagonal_(1).min() > 1e-3  # they are different methods


def test_without_compression_it_is_ddp(ranks):
    assert (ranks[0]["identity"] - ranks[0]["dense"]).abs().max() <= 1e-7
    assert (ranks[0]["ef21"] - ranks[0]["dense"]).abs().max() > 1e-3


def test_buckets_do_not_matter(ranks):
    assert torch.equal(ranks[0]["small buckets"], ranks[0]["ef21"])


def test_the_mean_of_the_estimates_is_known(ranks):
    shared = ranks[0]["shared"]
    assert set(shared) == {"net.0.weight"}  # the others have fewer than 256 elements and travel in full
    for name, mean in shared.items():
        own = torch.stack([rank["memory"][name]["estimate"] for rank in ranks])
        torch.testing.assert_close(own.mean(0), mean, rtol=0, atol=1e-6)
        assert not torch.equal(own[0], own[1])


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(ranks, name):
    for rank in ranks:
        result = rank["resumed"][name]
        assert torch.equal(result["resumed"], result["whole"])
        assert int(result["ranks"]) == 2
        assert result["step"].tolist() == [STEPS, 2 * STEPS]


def test_a_checkpoint_of_other_ranks_or_of_another_method(ranks):
    for rank in ranks:
        result = rank["ranks changed"]
        assert "MisconfigurationException: the checkpoint was written by 3 ranks, this run has 2" in result["refused"]
        assert "on_world_size_change='mean'" in result["refused"]
        assert "EF21Strategy cannot resume: the state is one of 'econtrol'" in result["other"]
        assert result["step"] == 2 * STEPS
    assert torch.equal(ranks[0]["ranks changed"]["weights"], ranks[1]["ranks changed"]["weights"])


def test_accumulated_micro_batches_are_one_batch(ranks):
    result = ranks[0]["accumulated"]
    torch.testing.assert_close(result["parts"], result["whole"], rtol=0, atol=1e-12)


def test_clipping_sees_what_the_optimizer_gets(ranks):
    steps = ranks[0]["clipped"].diff(dim=0)
    # momentum 0.5 adds up to twice a step of lr * clip
    assert steps.norm(dim=1).max() <= 2 * 0.3 * 1e-3 * (1 + 1e-3)


def test_a_loss_scale_stays_out_of_what_is_remembered(ranks):
    for rank in ranks:
        half, plain = rank["amp"]["fp16"], rank["amp"]["fp32 estimates"]
        # fp16 keeps 11 bits, over a few products; which entries are the largest may differ where they are close
        assert (half["estimates"] - plain).norm() <= 0.05 * plain.norm()
        assert half["scale"] == 2**10
        assert half["moved"].norm() > 0.01


def test_an_overflow_is_skipped_on_every_rank(ranks):
    for rank in ranks:
        result = rank["amp"]["overflow"]
        assert result["moved"].norm() == 0
        assert result["scale"] == 2.0**38  # halved at both steps
        assert result["remembered"] == 0
        assert result["skipped"] == 2


def test_bytes_and_errors_are_logged(ranks):
    values = ranks[0]["logs"]["values"]
    # 64 of 640 weights, 32 + 96 + 3 numbers in full, and whether they are finite
    assert values["comm/bytes_per_step"] == 64 * 8 + 131 * 4 + 4
    assert values["comm/compression_x"] == pytest.approx(771 * 4 / (64 * 8 + 131 * 4 + 4))
    assert 0 < values["comm/estimate_gap"] < 10
    assert values["comm/error_norm"] > 0
    (row,) = [row for row in ranks[0]["logs"]["rows"] if row["comm/bytes_per_step"]]
    assert row["step"] == str(STEPS - 1)


def test_names_for_the_trainer(ranks):
    assert ranks[0]["names"] == {
        "ddp_ef21": "EF21Strategy 2",
        "ddp_ef21_sgdm": "EF21Strategy 2",
        "ddp_ef21_w": "EF21Strategy 2",
        "ddp_econtrol": "EControlStrategy 2",
        "ddp_ef14": "EF14Strategy 2",
        "ddp_topk_naive": "NaiveCompressionStrategy 2",
    }


def test_unused_parameters_and_sparse_gradients_are_answered(ranks):
    for rank in ranks:
        assert "find_unused_parameters=True" in rank["unused refused"]
        assert "With this strategy" in rank["unused refused"]
        spare = rank["unused"][:, -420:]
        assert torch.equal(spare[0], spare[-1])
        assert "MisconfigurationException: EF21Strategy cannot compress the sparse gradients of table" in rank["sparse"]


def test_what_does_not_pay_or_fit_is_said(ranks):
    # 0.9 * 8 bytes of 640 weights, and all of 131 others, to two ranks; a ring sends 4 bytes of each twice
    expected = (0.9 * 8 * 640 + 4 * 131) * 2 / (8 * 771)
    said = ranks[0]["warnings"]
    assert f"TopK(ratio=0.9) on 2 ranks sends {expected:.1f} times the bytes of dense gradients" in said
    assert "four times the contraction" not in said
    assert "eta=0.5 is more than four times the contraction 0.1 of TopK(ratio=0.1)" in ranks[0]["large eta"]
    assert "times the bytes" not in ranks[0]["large eta"]
    assert "an error in bfloat16 loses" in said
    assert (
        "MisconfigurationException: EF21Strategy: weights must have one value for each of 2"
        in ranks[0]["three weights"]
    )


def test_a_rank_that_fails_ends_the_others_with_a_hint(ranks):
    assert "this rank fails" in ranks[1]["gone"]
    assert "A rank did not arrive, or is gone" in ranks[0]["gone"]


# --- one process -----------------------------------------------------------------------------------------------------


def test_one_rank_is_warned_and_trains_as_ddp_does():
    paths = []
    for strategy in (DDPStrategy(), EF21Strategy(TopK(0.1))):
        module = Small()
        trainer = pl.Trainer(
            strategy=strategy, devices=1, max_epochs=1, logger=False, enable_checkpointing=False, **QUIET
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, classes_loader(0))
        paths.append(stacked(module))
    assert any("EF21Strategy has one rank and nobody to send gradients to" in str(w.message) for w in caught)
    assert torch.equal(*paths)
    torch.distributed.destroy_process_group()


def test_one_rank_does_not_forget_in_silence_what_several_remembered(tmp_path):
    def trainer(**options):
        strategy = EF21Strategy(TopK(0.1), **options)
        return pl.Trainer(strategy=strategy, devices=1, max_epochs=2, logger=False, enable_checkpointing=False, **QUIET)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one rank
        saved = trainer()
        saved.fit(Small(), classes_loader(0))
        saved.save_checkpoint(tmp_path / "two.ckpt")
        content = torch.load(tmp_path / "two.ckpt", weights_only=True)
        torch.save({**content, "compression": {"shared": {"world_size": 2}, "ranks": [{}, {}]}}, tmp_path / "two.ckpt")
        with pytest.raises(
            MisconfigurationException, match="written by 2 ranks, this run has 1, and each rank of EF21"
        ):
            trainer().fit(Small(), classes_loader(0), ckpt_path=tmp_path / "two.ckpt")
        trainer(on_world_size_change="mean").fit(Small(), classes_loader(0), ckpt_path=tmp_path / "two.ckpt")
    torch.distributed.destroy_process_group()


def test_a_hook_beside_ours_is_refused():
    for name, value in (("ddp_comm_hook", print), ("ddp_comm_state", 1), ("ddp_comm_wrapper", print)):
        with pytest.raises(ValueError, match=f"{name} must be None, got .*EF21Strategy is a communication hook itself"):
            EF21Strategy(**{name: value})
    with pytest.raises(ValueError, match="find_unused_parameters and static_graph must not both be True"):
        EControlStrategy(find_unused_parameters=True, static_graph=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EControlStrategy(ScaledSign()), "eta=None takes the contraction of the compressor"),
        (lambda: EControlStrategy(eta=2.0), r"eta must be in \[0, 1\], got 2.0"),
        (lambda: EF21Strategy(weights="autp"), "weights must be 'uniform', 'auto' or one positive number a rank"),
        (lambda: EF21Strategy(weights=[0.5, 0.6]), "weights must sum to 1"),
        (lambda: EF21Strategy(on_world_size_change="drop"), "on_world_size_change must be one of 'raise', 'mean'"),
        (lambda: EF14Strategy(min_numel=-1), "min_numel must be >= 0"),
        (lambda: EF14Strategy(error_dtype="float16"), "error_dtype must be one of"),
    ],
)
def test_wrong_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sharded_gradients_are_refused():
    trainer = pl.Trainer(
        strategy=EF21Strategy(), devices=1, plugins=[FSDPPrecision("32-true")], logger=False, max_epochs=1, **QUIET
    )
    with pytest.raises(MisconfigurationException, match="FSDPPrecision: FSDP and DeepSpeed divide gradients"):
        trainer.fit(Small(), classes_loader(0))
    torch.distributed.destroy_process_group()
    with pytest.raises(TypeError, match="works on the buckets of DistributedDataParallel, and was called with Tensor"):
        compressed_allreduce_hook(None, torch.zeros(3))  # as FSDP calls its hooks


def test_a_rank_that_never_arrives_is_named_within_the_timeout():
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import time
from datetime import timedelta
import lightning.pytorch as pl
from lightning_opt.strategies import EF21Strategy
from tests.strategies.test_compressed_ddp import Small, classes_loader
trainer = pl.Trainer(
    strategy=EF21Strategy(timeout=timedelta(seconds=1)), devices=2, accelerator="cpu", logger=False
)
start = time.monotonic()
try:
    trainer.fit(Small(), classes_loader(0))
except Exception as error:
    print(type(error).__name__, error, time.monotonic() - start, sep="|")
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    kind, message, seconds = run.stdout[run.stdout.index("Dist") :].split("|")
    assert "Dist" in kind
    assert "A rank did not arrive, or is gone" in message
    assert float(seconds) < 60
