import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .labeled_data_module import Batch, LabeledDataModule, LabeledDataset, Split


class ImageDataModule(LabeledDataModule):
    """Labeled images that fit into memory, as one tensor, with a stratified validation split.

    A batch is ``(images, labels)``: float32 ``[B, C, H, W]``, normalized or not, and int64 ``[B]``. It is one indexing
    operation on the tensor of all images and one normalization, not a Python loop over images, which on a CPU takes
    about as long as the training step of a small network.

    A subclass sets the class attributes below and reads the images in :meth:`load`; where they must be fetched first,
    it does so in ``prepare_data``, which Lightning calls on one process of each machine.

    Attributes:
        classes: The names of the classes, in the order of the labels.
        shape: ``(C, H, W)`` of an image.
        max_value: The pixel value that stands for 1.
        mean: Mean of the training pixels, on the scale of 0 to 1, for each channel.
        std: Standard deviation of the training pixels, likewise.

    Args:
        normalize: Subtract ``mean`` and divide by ``std``; otherwise pixels are those of the image, from 0 to 1, as the
            generative models of this package take them.
        **kwargs: As for :class:`LabeledDataModule`.

    Raises:
        ValueError: If a number is out of its range.
        MisconfigurationException: In ``setup``, if there are fewer images than asked for.

    Cost: the memory of the images in their own dtype (47 MB for MNIST), twice that for a moment while they are split.

    Example:
        >>> class Stripes(ImageDataModule):
        ...     classes, shape, max_value = ("dark", "light"), (1, 2, 2), 1.0
        ...     mean, std = (0.5,), (0.5,)
        ...
        ...     def load(self, split):
        ...         labels = torch.arange(100) % 2
        ...         return labels[:, None, None, None].expand(-1, 1, 2, 2).float(), labels
        >>> data = Stripes(batch_size=10, val_size=20)
        >>> data.setup("fit")
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, bool((images[:, 0, 0, 0] == 2 * labels - 1).all()), len(data.train_dataloader())
        (torch.Size([10, 1, 2, 2]), True, 8)
    """

    noun = "images"
    shape: tuple[int, int, int]
    max_value: float = 255.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    train_set: "ImageDataset | None"
    val_set: "ImageDataset | None"
    test_set: "ImageDataset | None"

    def __init__(self, *, normalize: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.normalize = normalize

    @abc.abstractmethod
    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        """Read all images of one split.

        Args:
            split: ``"train"`` is divided into training and validation images afterwards.

        Returns:
            Images ``[N, C, H, W]`` (or ``[N, H, W]``), uint8 or floating point, and labels ``[N]`` of an integer dtype.
        """

    def make_dataset(self, inputs: Tensor, labels: Tensor) -> "ImageDataset":
        """The dataset that normalizes a batch when it is read."""
        return ImageDataset(inputs, labels, self)


class ImageDataset(LabeledDataset):
    """All images of a split in one tensor; indexed with a whole batch at once (``__getitems__``).

    :class:`ResumableLoader` hands such a batch on as it is; a plain ``DataLoader`` needs a ``collate_fn`` that does.

    Args:
        images: ``[N, C, H, W]`` or ``[N, H, W]``, uint8 or floating point, kept as they are.
        labels: ``[N]``.
        spec: Where shape, classes and normalization are read.
    """

    def __init__(self, images: Tensor, labels: Tensor, spec: ImageDataModule) -> None:
        super().__init__(images, labels, spec.noun)
        self.inputs = images.reshape(-1, *spec.shape)
        mean, std = (spec.mean, spec.std) if spec.normalize else ((0.0,), (1.0,))
        deviation = torch.tensor(std).view(-1, 1, 1)
        self.scale = 1 / (spec.max_value * deviation)
        self.shift = -torch.tensor(mean).view(-1, 1, 1) / deviation

    @property
    def images(self) -> Tensor:
        """All images ``[N, C, H, W]`` as they were read, not normalized."""
        return self.inputs

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices)
        return self.images[chosen].to(torch.float32).mul_(self.scale).add_(self.shift), self.labels[chosen]
