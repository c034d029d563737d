import lightning.pytorch as pl
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from lightning_opt._checks import check_interval
from lightning_opt.registry import register


@register("module", summary="Image classification with cross-entropy and accuracy")
class Classifier(pl.LightningModule):
    """Trains any network that maps images to logits with cross-entropy, and measures its accuracy.

    It defines no optimizer and takes no learning rate: those come from the command line, a config, or a
    ``configure_optimizers`` of a subclass. Batches are ``(images, labels)``, labels int64 ``[B]``.

    Logs ``train/loss`` by step; ``val/loss``, ``val/accuracy``, ``test/loss`` and ``test/accuracy`` by epoch, as means
    over images and, with several ranks, over all of them. Prediction gives probabilities ``[B, num_classes]``.

    Nothing but tensors enters a checkpoint, so it loads with ``weights_only=True``; give the network again:
    ``Classifier.load_from_checkpoint(path, net=MLP())``.

    Args:
        net: Maps images to logits ``[B, num_classes]``.
        num_classes: Number of classes.
        label_smoothing: Share of a label that is spread evenly over all classes, in training only.

    Raises:
        ValueError: If ``num_classes`` is below 2 or ``label_smoothing`` is not in [0, 1).

    Example:
        >>> import torch
        >>> from lightning_opt.models import MLP
        >>> model = Classifier(MLP(in_features=64))
        >>> images, labels = torch.zeros(5, 1, 8, 8), torch.zeros(5, dtype=torch.int64)
        >>> model.predict_step((images, labels)).sum(dim=1).allclose(torch.ones(5))
        True
    """

    def __init__(self, net: nn.Module, num_classes: int = 10, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_interval("num_classes", num_classes, 2)
        check_interval("label_smoothing", label_smoothing, 0, 1, closed="[)")
        self.net = net
        self.label_smoothing = label_smoothing
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, ...]``."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of a batch, mean over its images."""
        images, labels = batch
        loss = functional.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Loss and accuracy of a batch."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Loss and accuracy of a batch."""
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: tuple[Tensor, Tensor] | Tensor) -> Tensor:
        """Probabilities ``[B, num_classes]`` of the images of a batch, with or without labels."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).softmax(dim=1)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        self.log(f"{stage}/loss", functional.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True, batch_size=len(labels))
