import torch
from sklearn.datasets import load_digits
from torch import Tensor

from lightning_opt.registry import register

from .image_data_module import ImageDataModule
from .labeled_data_module import Split, stratified_order


@register("data", summary="Handwritten digits bundled with scikit-learn, 8x8, 1,437 + 360, no download")
class Digits(ImageDataModule):
    """Handwritten digits, 8x8 with 17 gray levels, ten classes; bundled with scikit-learn, so nothing is fetched.

    360 of the 1,797 images, stratified and the same for every seed, are the test set.

    Source: the test part of UCI's "Optical Recognition of Handwritten Digits". Arguments as for
    :class:`ImageDataModule`.

    Example:
        >>> data = Digits(val_size=137)
        >>> data.setup()
        >>> len(data.train_set), len(data.val_set), len(data.test_set)
        (1300, 137, 360)
    """

    classes = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    shape = (1, 8, 8)
    max_value = 16.0
    mean, std = (0.3053,), (0.3760,)

    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        """The bundled images, divided into 1,437 and 360."""
        bundled = load_digits()
        images, labels = torch.from_numpy(bundled.images).to(torch.uint8), torch.from_numpy(bundled.target)
        order = stratified_order(labels, seed=0)
        part = (order[:_TEST_SIZE] if split == "test" else order[_TEST_SIZE:]).sort().values
        return images[part], labels[part]


_TEST_SIZE = 360
