import importlib.resources
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_opt._checks import check_choice
from lightning_opt.registry import register

from ._dtype import moves_only
from ._images import check_images

FeatureNetName = Literal["digits8", "grey28"]


@register("module", summary="Small image classifiers that the package ships, as features for distances between images")
class FeatureNet(nn.Module):
    """A small convolutional classifier whose last hidden layer is the space in which sets of images are compared.

    Convolutions 3x3 with ReLU, then one linear layer with ReLU: the features, scaled so that their variances over the
    training images sum to their number. Distances are therefore in units of the data's own spread.

    ``FeatureNet.load("digits8")``
        32 features of scikit-learn's digits, 8x8. Trained on the 1,437 images of ``Digits().load("train")``; score
        against the other 360, of which it classifies 98.9 % rightly. An eleventh class, ``"none"``, is for noise,
        shuffled pixels and images laid over each other: without it noise fell among the eights.
    ``FeatureNet.load("grey28")``
        48 features of gray images, 28x28. Trained on the training images of MNIST and Fashion-MNIST, and on 8,000 of
        the 10,000 test images of Kuzushiji-MNIST. Score against test images; of Kuzushiji against the first 2,000 in
        the order ``stratified_order(labels, seed=0)``, which training did not see either. Among all 30 classes it
        classifies 98.6 %, 85.0 % and 96.0 % of those rightly.

    One net serves all three: a defect (noise, blur, rotation, fainter images, halves of two images, a missing class)
    multiplies its Frechet distance on MNIST, Fashion and Kuzushiji by 17, 11 and 11 in the geometric mean; that of
    nets trained on each alone by 8, 13 and 8. Features trained without Kuzushiji separate its classes linearly at 62 %
    instead of 95 %. One seed each.

    ``python benchmarks/feature_nets.py`` trains both anew, from fixed seeds, and measures what is said here.

    The weights are buffers outside ``state_dict()`` and ``parameters()``: a metric that is part of a model adds nothing
    to its checkpoints or to its optimizer. They stay in float32 when the model around them is cast, and autocast is
    off inside. Gradients flow to the images.

    Args:
        weights: ``conv<i>_weight``, ``conv<i>_bias``, ``features_weight``, ``features_bias``, ``classes_weight``,
            ``classes_bias``.
        strides: Of each convolution.
        size: Height and width of an image.
        classes: Names of the classes.
        accuracy: Share of held-out images that are classified rightly, by data set.

    Attributes:
        num_features: Number of features.
        image_shape: ``(1, size, size)``.

    Raises:
        ValueError: By ``load`` if there is no net of that name; by a call if the images are of another size or not in
            [0, 1].

    Example:
        >>> net = FeatureNet.load("digits8")
        >>> net(torch.zeros(5, 1, 8, 8)).shape, len(net.classes), net.accuracy["digits"] > 0.95
        (torch.Size([5, 32]), 11, True)
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        strides: Sequence[int],
        size: int,
        classes: Sequence[str],
        accuracy: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        for name, value in weights.items():
            self.register_buffer(name, value, persistent=False)
        self.strides = tuple(strides)
        self.classes = tuple(classes)
        self.accuracy = dict(accuracy or {})
        self.num_features = len(weights["features_bias"])
        self.image_shape = (1, size, size)

    @classmethod
    def load(cls, name: FeatureNetName) -> "FeatureNet":
        """The shipped net of this name."""
        check_choice("name", name, get_args(FeatureNetName))
        content = (importlib.resources.files(__package__) / "weights" / f"{name}.pt").read_bytes()
        saved: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return cls(**saved)

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[N, num_features]``, float32, of images ``[N, 1, size, size]`` in [0, 1]."""
        check_images("images", images, self.image_shape)
        with torch.autocast(images.device.type, enabled=False):
            x = images.float()
            for i, stride in enumerate(self.strides):
                weight, bias = self.get_buffer(f"conv{i}_weight"), self.get_buffer(f"conv{i}_bias")
                x = functional.relu(functional.conv2d(x, weight, bias, stride=stride, padding=1))
            return functional.relu(self._linear("features", x.flatten(1)))

    def classify(self, features: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of features ``[N, num_features]``."""
        with torch.autocast(features.device.type, enabled=False):
            return self._linear("classes", features.float())

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.get_buffer(f"{name}_weight"), self.get_buffer(f"{name}_bias"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FeatureNet":
        return super()._apply(moves_only(fn), recurse)
