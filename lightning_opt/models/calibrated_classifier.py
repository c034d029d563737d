import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_opt._checks import check_interval
from lightning_opt.registry import register


@register("module", summary="A frozen classifier of unbalanced data, whose logits are calibrated for macro-F1")
class CalibratedClassifier(pl.LightningModule):
    """A linear classifier that saw few images of half of the classes, with a scale and an offset for each logit.

    The classifier is fitted once, before training, by logistic regression to ``common`` images of one half of the
    classes and ``rare`` of the other, and is frozen: it takes rare classes for common ones. What is trained are the
    scales and offsets ``[num_classes]`` of its logits, for the F1 score of the decisions. That score has no gradient;
    train it with a strategy that needs none.

    With several ranks each has classes of its own, the first rank the first ones, and looks only at their images: the
    ranks' objectives are at odds, and only together they are about all classes.

    It takes no learning rate and defines no optimizer. Batches are ``(images, labels)``. Logs ``train/macro_f1`` by
    step, of rank 0's own classes; ``val/loss``, ``val/accuracy``, ``val/macro_f1`` and the same for ``test`` by epoch,
    over all classes.

    Args:
        in_features: Numbers of an image.
        num_classes: Number of classes.
        common: Images that the classifier sees of a common class.
        rare: Images that it sees of a rare class.
        seed: Of the choice of rare classes and of images.

    Raises:
        ValueError: If a number is out of its range.
        MisconfigurationException: In ``setup``, if there is no data module with a ``train_set``, as those of this
            package have.

    Example:
        >>> model = CalibratedClassifier(in_features=4, num_classes=3)
        >>> model.scale.data[1] = 2.0
        >>> model.weight[1], model.bias[:] = torch.ones(4), torch.tensor([1.0, 0.0, 0.0])
        >>> model(torch.full((1, 4), 0.5)).tolist()
        [[1.0, 4.0, 0.0]]
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, in_features: int = 64, num_classes: int = 10, common: int = 60, rare: int = 4, seed: int = 0
    ) -> None:
        super().__init__()
        check_interval("in_features", in_features, 1)
        check_interval("num_classes", num_classes, 2)
        check_interval("rare", rare, 1)
        check_interval("common", common, rare)
        check_interval("seed", seed, 0)
        self.num_classes, self.common, self.rare, self.seed = num_classes, common, rare, seed
        self.scale, self.offset = nn.Parameter(torch.ones(num_classes)), nn.Parameter(torch.zeros(num_classes))
        self.register_buffer("weight", torch.zeros(num_classes, in_features))
        self.register_buffer("bias", torch.zeros(num_classes))
        self.measures = nn.ModuleDict(
            {
                f"{stage}_{name}": measure(num_classes, average=average, validate_args=False)
                for stage in ("val", "test")
                for name, measure, average in (
                    ("accuracy", MulticlassAccuracy, "micro"),
                    ("macro_f1", MulticlassF1Score, "macro"),
                )
            }
        )

    def setup(self, stage: str) -> None:
        """Fit the classifier to the training images."""
        if stage != "fit":
            return
        train_set = getattr(getattr(self.trainer, "datamodule", None), "train_set", None)
        if train_set is None:
            raise MisconfigurationException(f"{type(self).__name__} needs a data module with a train_set.")
        inputs, labels = train_set.__getitems__(range(len(train_set)))
        weight, bias = unbalanced_classifier(inputs, labels, self.num_classes, self.common, self.rare, self.seed)
        self.weight.copy_(weight)
        self.bias.copy_(bias)

    def forward(self, images: Tensor) -> Tensor:
        """Calibrated logits ``[B, num_classes]`` of images ``[B, ...]``."""
        return self.scale * functional.linear(images.flatten(1), self.weight, self.bias) + self.offset

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One less the mean F1 score of this rank's classes in a batch: a number without gradient."""
        images, labels = batch
        own = labels * self.trainer.world_size // self.num_classes == self.trainer.global_rank
        score = macro_f1(self(images).argmax(dim=1), labels, self.num_classes, own)
        self.log("train/macro_f1", score, prog_bar=True, batch_size=len(labels))
        return 1 - score

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Loss, accuracy and macro-F1 of a batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Loss, accuracy and macro-F1 of a batch."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor] | Tensor) -> Tensor:
        """Probabilities ``[B, num_classes]`` of the images of a batch, with or without labels."""
        return self(batch if isinstance(batch, Tensor) else batch[0]).softmax(dim=1)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, labels = batch
        logits = self(images)
        self.log(f"{stage}/loss", functional.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        for name in ("accuracy", "macro_f1"):
            measure = self.measures[f"{stage}_{name}"]
            measure.update(logits, labels)  # type: ignore[operator]
            self.log(f"{stage}/{name}", measure, prog_bar=True, batch_size=len(labels))  # type: ignore[arg-type]


def macro_f1(predicted: Tensor, labels: Tensor, num_classes: int, where: Tensor | None = None) -> Tensor:
    """The mean F1 score of the classes that occur among the labels; may be vectorized by ``torch.func.vmap``.

    Args:
        predicted: ``[B]``.
        labels: ``[B]``.
        num_classes: Number of classes.
        where: Samples that count, ``[B]``; None for all.

    Returns:
        0-dim, float32; 0 if no sample counts.

    Example:
        >>> macro_f1(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1]), 3).item()  # 2/3 and 1/2
        0.5833333730697632
    """
    classes = torch.arange(num_classes, device=labels.device)
    counts = 1.0 if where is None else where[:, None].float()
    said, true = ((column[:, None] == classes) * counts for column in (predicted, labels))
    scores = 2 * (said * true).sum(0) / (said.sum(0) + true.sum(0)).clamp_min(1)
    occurs = (true.sum(0) > 0).float()
    return (scores * occurs).sum() / occurs.sum().clamp_min(1)


def unbalanced_classifier(
    inputs: Tensor, labels: Tensor, num_classes: int, common: int, rare: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Logistic regression on ``common`` samples of half of the classes, chosen at random, and ``rare`` of the others.

    Args:
        inputs: ``[N, ...]``.
        labels: ``[N]``.
        num_classes: Number of classes; all must occur.
        common: As said.
        rare: As said.
        seed: Of the choices.

    Returns:
        Weights ``[num_classes, features]`` and biases ``[num_classes]``, float32.
    """
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    is_rare = torch.zeros(num_classes, dtype=torch.bool)
    is_rare[torch.randperm(num_classes, generator=generator)[: num_classes // 2]] = True
    shown = [order[labels[order] == k][: rare if is_rare[k] else common] for k in range(num_classes)]
    seen = torch.cat(shown)
    fitted = LogisticRegression(C=0.1, max_iter=2000).fit(inputs[seen].flatten(1).double(), labels[seen])
    return torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()
