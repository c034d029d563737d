from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_opt.registry import register

from .fetch import DataNotFoundError, PublishedFile
from .idx_images import IdxImages
from .labeled_data_module import Split, stratified_order


@register("data", summary="MNIST: handwritten digits, 28x28, 60,000 + 10,000")
class MNIST(IdxImages):
    """Handwritten digits, 28x28, ten classes; 60,000 training and 10,000 test images (11 MB to fetch).

    Source: LeCun, Cortes, Burges. Arguments as for :class:`IdxImages` and :class:`ImageDataModule`.

    Example:
        >>> data = MNIST(train_size=10_000)
        >>> data.num_classes, data.shape
        (10, (1, 28, 28))
    """

    classes = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    shape = (1, 28, 28)
    mean, std = (0.1307,), (0.3081,)
    folders = ("mnist", "MNIST/raw")
    mirrors = (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    )
    files = {
        "train": (
            PublishedFile(
                "train-images-idx3-ubyte",
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            ),
            PublishedFile(
                "train-labels-idx1-ubyte",
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            ),
        ),
        "test": (
            PublishedFile(
                "t10k-images-idx3-ubyte",
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            ),
            PublishedFile(
                "t10k-labels-idx1-ubyte",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
        ),
    }


@register("data", summary="Fashion-MNIST: articles of clothing, 28x28, 60,000 + 10,000", paper="1708.07747")
class FashionMNIST(IdxImages):
    """Articles of clothing, 28x28, ten classes; 60,000 training and 10,000 test images (31 MB to fetch).

    Source: arXiv 1708.07747. Arguments as for :class:`IdxImages` and :class:`ImageDataModule`.

    Example:
        >>> FashionMNIST().classes[9]
        'Ankle boot'
    """

    classes = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    shape = (1, 28, 28)
    mean, std = (0.2860,), (0.3530,)
    folders = ("fashion-mnist", "FashionMNIST/raw")
    system_folder = "/usr/share/datasets/fashion-mnist"
    system_package = "dataset-fashion-mnist"
    mirrors = (
        "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    )
    files = {
        "train": (
            PublishedFile(
                "train-images-idx3-ubyte",
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            ),
            PublishedFile(
                "train-labels-idx1-ubyte",
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            ),
        ),
        "test": (
            PublishedFile(
                "t10k-images-idx3-ubyte",
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            ),
            PublishedFile(
                "t10k-labels-idx1-ubyte",
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            ),
        ),
    }


@register("data", summary="Kuzushiji-MNIST: cursive Japanese characters, 28x28, 60,000 + 10,000", paper="1812.01718")
class KMNIST(IdxImages):
    """Cursive Japanese characters, 28x28, ten classes; 60,000 training and 10,000 test images (21 MB to fetch).

    Source: arXiv 1812.01718.

    Args:
        divide_test: Where the training files are neither at hand nor can be fetched, divide the 10,000 test images,
            stratified and the same for every seed: 8,000 to train and validate on, 2,000 to test on. That is said in a
            warning, since what comes out does not compare with the published split.
        **kwargs: As for :class:`IdxImages` and :class:`ImageDataModule`.

    Raises:
        DataNotFoundError: As :class:`IdxImages`; with ``divide_test`` only if the test files are missing too.

    Example:
        >>> KMNIST().classes[:3]
        ('o', 'ki', 'su')
    """

    classes = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    shape = (1, 28, 28)
    mean, std = (0.1918,), (0.3483,)
    folders = ("kmnist", "KMNIST/raw")
    mirrors = (
        "https://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
    )
    files = {
        "train": (
            PublishedFile(
                "train-images-idx3-ubyte", "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4"
            ),
            PublishedFile(
                "train-labels-idx1-ubyte", "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17"
            ),
        ),
        "test": (
            PublishedFile(
                "t10k-images-idx3-ubyte",
                "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
                "76fbd229ce87db80dd281af5e6670de4ad0e42fb30a7bd643972994c47c1f42e",
            ),
            PublishedFile(
                "t10k-labels-idx1-ubyte",
                "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
                "a11dc742be8e781a40a92f53d6a4957e7b7d36df2faa097659131ebfd8fd60c6",
            ),
        ),
    }

    def __init__(self, *, divide_test: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.divide_test = divide_test

    def provide(self, split: Split) -> None:
        """Fetch the files of a split; with ``divide_test`` those of training, else those of testing."""
        if self.divide_test:  # every stage must come to the same answer
            try:
                super().provide("train")
            except DataNotFoundError:
                split = "test"
        super().provide(split)

    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        """Read and check the two files of a split, or a part of the test images."""
        if not self.divide_test or self.is_at_hand("train"):
            return super().load(split)
        images, labels = super().load("test")
        order = stratified_order(labels, seed=0)
        test = len(labels) // 5
        rank_zero_warn(
            f"{type(self).__name__} has no training files at hand: of the {len(labels):,} test images"
            f" {len(labels) - test:,} serve for training and validation and {test:,} for testing."
        )
        part = (order[:test] if split == "test" else order[test:]).sort().values
        return images[part], labels[part]
