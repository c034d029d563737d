import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_opt.callbacks import ResumeState
from lightning_opt.data import CharText
from lightning_opt.models import CharGPT, LanguageModel


class Trained(LanguageModel):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 2e-2)


def new_trainer(**kwargs: Any) -> pl.Trainer:
    defaults = {"logger": False, "enable_checkpointing": False, "max_epochs": 1, "log_every_n_steps": 1}
    return pl.Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **defaults | kwargs)


class Table(nn.Module):
    """Logits of the next token that depend on the last one alone: a table of bigrams."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits[tokens]


@pytest.fixture
def abc(tmp_path: Path) -> CharText:
    path = tmp_path / "text"
    path.write_text("abcab" * 40)
    return CharText(str(path), context=3, val_size=50, test_size=30, batch_size=4, eval_batch_size=7)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_averages_over_characters(abc: CharText, stage: str) -> None:
    net = Table(4)
    evaluate = new_trainer().validate if stage == "val" else new_trainer().test
    (metrics,) = evaluate(LanguageModel(net), datamodule=abc, verbose=False)
    size, start = (50, 120) if stage == "val" else (30, 170)
    text = [" abc".index(c) for c in ("abcab" * 40)[start : start + size]]
    used = (size - 1) // 3 * 3  # 16 windows of 3 in batches of 7, 7, 2; or 9 in 7, 2
    losses = [-net.logits.log_softmax(1)[text[i], text[i + 1]].item() for i in range(used)]
    # float32 with about 1e-7 an addition
    assert metrics[f"{stage}/loss"] == pytest.approx(sum(losses) / used, rel=1e-5)
    assert metrics[f"{stage}/bits_per_character"] == pytest.approx(sum(losses) / used / math.log(2), rel=1e-5)
    assert set(metrics) == {f"{stage}/loss", f"{stage}/bits_per_character"}


def test_prediction_gives_the_probabilities_of_the_token_behind_a_window(abc: CharText) -> None:
    net = Table(4)
    parts = new_trainer().predict(LanguageModel(net), datamodule=abc)
    assert parts is not None
    assert abc.test_set is not None
    last = torch.stack([abc.test_set[i][0][-1] for i in range(len(abc.test_set))])
    torch.testing.assert_close(torch.cat(parts), net.logits.softmax(1)[last])
    torch.testing.assert_close(LanguageModel(net).predict_step(last[:, None]), torch.cat(parts))  # without targets


def test_generation_follows_the_model() -> None:
    net = Table(3)
    with torch.no_grad():
        net.logits.fill_(-100)
        net.logits[0, 1] = net.logits[1, 2] = 0  # after 0 comes 1, after 1 comes 2
        net.logits[2, :2] = torch.tensor([0.0, math.log(3.0)])  # after 2 comes 0 or, three times as often, 1
    model = LanguageModel(net)
    assert model.generate(torch.tensor([0]), 6, temperature=0).tolist() == [1, 2, 1, 2, 1, 2]
    text = model.generate(torch.tensor([0]), 4000, generator=torch.Generator().manual_seed(0)).tolist()
    followers = [b for a, b in zip(text, text[1:], strict=False) if a == 2]
    # about 1,800 drawings: 4 standard errors of sqrt(3/16 / 1800) are 0.04
    assert abs(sum(followers) / len(followers) - 0.75) < 0.04
    assert all(b == a + 1 for a, b in zip(text, text[1:], strict=False) if a < 2)
    again = model.generate(torch.tensor([0]), 4000, generator=torch.Generator().manual_seed(0)).tolist()
    assert text == again


def test_generation_looks_back_no_further_than_the_context_and_leaves_no_trace() -> None:
    net = CharGPT(vocab_size=5, context=4, width=8, depth=1, heads=2, dropout=0.5)
    model = LanguageModel(net)
    prompt = torch.tensor([0, 1, 2, 3, 4, 3, 2])
    state = torch.get_rng_state()
    greedy = model.generate(prompt, 10, temperature=0)
    assert torch.equal(greedy, model.generate(prompt[-4:], 10, temperature=0))
    assert net.training
    assert torch.equal(state, torch.get_rng_state())
    for arguments, message in (
        ((prompt[:0], 1), r"prompt must have the shape \[T\] with T >= 1, got \[0\]"),
        ((prompt, -1), "length must be >= 0"),
        ((prompt, 1, -0.5), "temperature must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(*arguments)


@pytest.mark.parametrize("sizes", [{"vocab_size": 3, "context": 3}, {"vocab_size": 4, "context": 2}])
def test_a_network_too_small_for_the_data_is_refused_in_setup(abc: CharText, sizes: dict[str, int]) -> None:
    model = Trained(CharGPT(width=4, depth=1, heads=1, **sizes))
    name = "vocab_size" if sizes["vocab_size"] == 3 else "context"
    message = f"CharText has {name}={sizes[name] + 1}, CharGPT takes {name}={sizes[name]}"
    with pytest.raises(MisconfigurationException, match=message):
        new_trainer().fit(model, abc)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_learns_and_resumes_within_an_epoch(abc: CharText, tmp_path: Path) -> None:
    def fit(seed: int, **kwargs: Any) -> tuple[LanguageModel, pl.Trainer]:
        torch.manual_seed(seed)
        model = Trained(CharGPT(vocab_size=4, context=3, width=16, depth=1, heads=2, dropout=0.1))
        data = CharText(abc.path, context=3, val_size=50, test_size=30, batch_size=4)  # 10 batches an epoch
        saving = ModelCheckpoint(tmp_path / str(seed), filename="{step}", every_n_train_steps=37, save_top_k=-1)
        trainer = new_trainer(
            max_steps=80,
            max_epochs=-1,
            callbacks=[saving, ResumeState()],
            limit_val_batches=0,
            enable_checkpointing=True,
        )
        trainer.fit(model, data, **kwargs)
        return model, trainer

    straight, _ = fit(0)
    resumed, trainer = fit(1, ckpt_path=tmp_path / "0" / "step=37.ckpt", weights_only=True)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    (metrics,) = trainer.test(resumed, datamodule=abc, verbose=False)
    # a is followed by b and c by a; b by a or c alike, which the two characters before it tell, but only at the last of
    # the 3 places of a window: 2/3 * 2/5 = 0.27 bits at best, log2(3) = 1.58 by chance
    assert metrics["test/bits_per_character"] < 0.8


def test_a_config_builds_it_by_short_names() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model")
    net = {"class_path": "CharGPT", "init_args": {"vocab_size": 30, "width": 8, "heads": 2, "depth": 1}}
    model = parser.instantiate(
        parser.parse_object({"model": {"class_path": "LanguageModel", "init_args": {"net": net}}})
    ).model
    assert type(model) is LanguageModel
    assert model(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 30)
    assert LanguageModel.configure_optimizers is pl.LightningModule.configure_optimizers
