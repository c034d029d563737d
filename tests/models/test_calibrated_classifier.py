from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.metrics import f1_score

from lightning_opt.data import Digits
from lightning_opt.models import CalibratedClassifier
from lightning_opt.models.calibrated_classifier import macro_f1, unbalanced_classifier
from lightning_opt.strategies import FZooSStrategy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*with one rank there is nothing to correct by"),
]

generator = torch.Generator().manual_seed(0)
LABELS = torch.randint(6, (80,), generator=generator)
PREDICTED = torch.where(torch.rand(80, generator=generator) < 0.5, LABELS, torch.randint(6, (80,), generator=generator))


def test_macro_f1_is_that_of_scikit_learn():
    expected = f1_score(LABELS, PREDICTED, average="macro")
    assert macro_f1(PREDICTED, LABELS, 6).item() == pytest.approx(expected, rel=1e-6)
    own = LABELS < 3
    expected = f1_score(LABELS[own], PREDICTED[own], labels=[0, 1, 2], average="macro")
    assert macro_f1(PREDICTED, LABELS, 6, own).item() == pytest.approx(expected, rel=1e-6)
    assert macro_f1(PREDICTED, LABELS, 6, LABELS > 6).item() == 0


def test_many_candidates_at_once():
    many = torch.stack([PREDICTED, LABELS])
    scores = torch.func.vmap(lambda predicted: macro_f1(predicted, LABELS, 6))(many)
    assert scores.tolist() == [macro_f1(PREDICTED, LABELS, 6).item(), 1.0]


def test_the_classifier_confuses_classes_that_it_saw_little_of():
    data = Digits()
    data.setup()
    inputs, labels = data.train_set.__getitems__(range(len(data.train_set)))
    weight, bias = unbalanced_classifier(inputs, labels, 10, common=60, rare=4, seed=0)
    predicted = (inputs.flatten(1) @ weight.T + bias).argmax(1)
    recalls = sorted(((predicted == k) & (labels == k)).sum().item() / (labels == k).sum().item() for k in range(10))
    assert sum(recalls[:5]) / 5 < 0.6  # five classes are rare
    assert recalls[5] > 0.9


def test_ranks_look_at_their_own_classes():
    module = CalibratedClassifier(in_features=6, num_classes=6)
    module.weight.copy_(torch.eye(6))
    images = torch.nn.functional.one_hot(PREDICTED, 6).float()
    for rank in range(2):
        module.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        module.log = lambda *_, **__: None
        expected = 1 - macro_f1(PREDICTED, LABELS, 6, (LABELS < 3) if rank == 0 else (LABELS >= 3))
        assert module.training_step((images, LABELS)) == expected


def fit(folder, steps, **options):
    module, data = CalibratedClassifier(), Digits(batch_size=2000)
    trainer = pl.Trainer(
        strategy=FZooSStrategy(
            local_steps=5, lr=0.1, radius=0.3, noise=0.01, active=2, sync_active=10, process_group_backend="gloo"
        ),
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1.0)
    trainer.fit(module, data, **options)
    return trainer, module, data


def test_the_strategy_raises_macro_f1_and_the_classifier_comes_back_from_a_checkpoint(tmp_path):
    trainer, module, data = fit(tmp_path, 15)
    assert trainer.strategy.client.objective < trainer.strategy.client.first_objective - 0.1
    # all classes, that means, of the only rank; measured on images that were not trained on
    (tested,) = trainer.test(module, data, verbose=False)
    with torch.no_grad():
        module.scale.fill_(1.0)
        module.offset.zero_()
    (plain,) = trainer.test(module, data, verbose=False)
    assert tested["test/macro_f1"] > plain["test/macro_f1"] + 0.05
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = CalibratedClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    torch.testing.assert_close(loaded.weight, module.weight, rtol=0, atol=0)
    assert float(loaded.weight.abs().max()) > 0
    probabilities = loaded.predict_step(data.test_set.__getitems__([0, 1, 2]))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))


def test_a_module_without_training_set_is_refused():
    module = CalibratedClassifier()
    module.trainer = SimpleNamespace(datamodule=None)
    with pytest.raises(MisconfigurationException, match="needs a data module with a train_set"):
        module.setup("fit")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"rare": 0}, "rare must be >= 1"), ({"common": 3}, "common must be >= 4"), ({"num_classes": 1}, "num_classes")],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        CalibratedClassifier(**wrong)
