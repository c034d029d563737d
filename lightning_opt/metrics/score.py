import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

from ._images import check_images
from .distances import Features, frechet_distance, kernel_distance
from .feature_net import FeatureNet
from .features import extract_features, features_for
from .neighbors import nearest_neighbor_distance, precision_recall
from .sliced import sliced_wasserstein


@dataclasses.dataclass(frozen=True)
class SetScores:
    """What one set of images scores against the held-out images.

    Attributes:
        frechet: :func:`frechet_distance`.
        kernel: :func:`kernel_distance`.
        precision: Share of the images among the held-out ones.
        recall: Share of the held-out images among these.
        sliced_wasserstein: :func:`sliced_wasserstein`.
        confidence: Mean probability of the likeliest class; None without a classifier.
        class_counts: How many images are of each class, as the net sees them; empty without a classifier.
    """

    frechet: float
    kernel: float
    precision: float
    recall: float
    sliced_wasserstein: float
    confidence: float | None = None
    class_counts: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SampleScores:
    """The scores of samples, with what they must be read beside. ``print`` shows a table.

    Attributes:
        count: Number of images in each set.
        samples: The samples against the held-out images.
        real: As many training images against the held-out images: what a perfect model would score.
        noise: As many images of independent uniform pixels against the held-out images.
        nearest: Median distance of a sample to the nearest training image, :func:`nearest_neighbor_distance`.
        nearest_held_out: The same of a held-out image. A model that has memorized comes much nearer.
        held_out_class_counts: Of the held-out images.
    """

    count: int
    samples: SetScores
    real: SetScores
    noise: SetScores
    nearest: float
    nearest_held_out: float
    held_out_class_counts: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def missing_classes(self) -> list[str]:
        """Classes of at least one in fifty of the held-out images that no sample is of."""
        held_out = self.held_out_class_counts
        return [
            name for name, n in held_out.items() if 50 * n >= self.count and not self.samples.class_counts.get(name)
        ]

    def as_dict(self) -> dict[str, float]:
        """All numbers but the class counts, flat, for a logger: ``frechet``, ``frechet_real``, ..., ``nearest``."""
        flat = {}
        for suffix, scores in (("", self.samples), ("_real", self.real), ("_noise", self.noise)):
            for name in _NUMBERS:
                value = getattr(scores, name)
                if value is not None:
                    flat[name + suffix] = value
        return {**flat, "nearest": self.nearest, "nearest_held_out": self.nearest_held_out}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.count} of each, against held-out images".ljust(40) + "   samples      real     noise"
        for name, label in _NUMBERS.items():
            values = [getattr(scores, name) for scores in (self.samples, self.real, self.noise)]
            if None not in values:
                yield label.ljust(40) + "".join(f"{value:10.4g}" for value in values)
        yield "distance to the nearest training image".ljust(40) + f"{self.nearest:10.4g}"
        yield "the same of held-out images".ljust(40) + f"{self.nearest_held_out:10.4g}"
        if self.held_out_class_counts:
            yield "samples by class, beside held-out images:"
            names = [*self.held_out_class_counts, *(self.samples.class_counts.keys() - self.held_out_class_counts)]
            pairs = ((n, self.samples.class_counts.get(n, 0), self.held_out_class_counts.get(n, 0)) for n in names)
            yield "  " + ", ".join(f"{name}: {ours} ({held_out})" for name, ours, held_out in pairs)
        if self.missing_classes:
            yield f"no sample is of {', '.join(self.missing_classes)}"


@register("tool", summary="Scores samples beside real images and noise, all against the same held-out images")
def score_samples(
    samples: Tensor, held_out: Tensor, real: Tensor, *, features: Features = "auto", k: int = 3, seed: int = 0
) -> SampleScores:
    """Score samples of a generative model beside real images and noise, all against the same held-out images.

    Every set holds as many images as there are samples, because the distances depend on the number. Take 500 or more.

    Args:
        samples: ``[N, C, H, W]``, floating point in [0, 1].
        held_out: ``[N, C, H, W]``, images that neither the model nor the feature net was trained on. Choose them at
            random where there are more: the files of digits and of MNIST lie in the order of their writers.
        real: ``[M, C, H, W]``, all training images, M >= N. The nearest neighbors are sought among all of them; N of
            them, chosen by ``seed``, are scored in the place of samples.
        features: As for :func:`load_features`, or ``"auto"`` for the shipped net of the images' size.
        k: The neighbor of :func:`precision_recall`.
        seed: Seed of the choice of real images, of the noise and of the directions of
            :func:`sliced_wasserstein`; the global random state is neither used nor changed.

    Returns:
        All scores.

    Raises:
        ValueError: If images are not in [0, 1], differ in shape, or if there are not as many held-out images as
            samples or fewer real ones.

    Cost: one pass of the net over four sets, and products of all pairs of samples and real images.

    Example:
        >>> from lightning_opt.data import Digits
        >>> digits = Digits()
        >>> real, held_out = (digits.load(part)[0][:, None] / 16 for part in ("train", "test"))
        >>> scores = score_samples(held_out.flip(0).roll(1, dims=3), held_out, real)  # shifted by a pixel
        >>> scores.real.frechet < scores.samples.frechet < scores.noise.frechet
        True
        >>> scores.missing_classes
        []
    """
    if features is None:
        raise ValueError("features must be a net's name, a module or 'auto': these scores look at images too")
    check_images("samples", samples)
    shape, count, device = tuple(samples.shape[1:]), len(samples), samples.device
    check_images("held_out", held_out, shape)
    check_images("real", real, shape)
    check_interval("k", k, 1, count - 1)
    if len(held_out) != count:
        raise ValueError(
            f"held_out must hold as many images as samples, {count}, got {len(held_out)}: choose {count} at random, or"
            " draw another number of samples"
        )
    if len(real) < count:
        raise ValueError(f"real must hold at least as many images as samples, {count}, got {len(real)}")
    net = features_for(samples, features, "samples")
    generator = torch.Generator().manual_seed(seed)
    chosen = real[torch.randperm(len(real), generator=generator)[:count].to(real.device)].to(device)
    noise = torch.rand(samples.shape, generator=generator).to(device)
    held_out = held_out.to(device)
    reference = extract_features(held_out, net)

    def score(images: Tensor) -> SetScores:
        rows = extract_features(images, net)
        precision, recall = precision_recall(rows, reference, k, features=None)
        return SetScores(
            frechet=frechet_distance(rows, reference, features=None),
            kernel=kernel_distance(rows, reference, features=None),
            precision=precision,
            recall=recall,
            sliced_wasserstein=sliced_wasserstein(images, held_out, seed=seed),
            confidence=_confidence(net, rows),
            class_counts=_class_counts(net, rows),
        )

    return SampleScores(
        count=count,
        samples=score(samples),
        real=score(chosen),
        noise=score(noise),
        nearest=float(nearest_neighbor_distance(samples, real).median()),
        nearest_held_out=float(nearest_neighbor_distance(held_out, real).median()),
        held_out_class_counts=_class_counts(net, reference),
    )


_NUMBERS = {
    "frechet": "Frechet distance",
    "kernel": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "sliced_wasserstein": "sliced Wasserstein distance of pixels",
    "confidence": "confidence of the classifier",
}


def _confidence(net: nn.Module, features: Tensor) -> float | None:
    if not isinstance(net, FeatureNet):
        return None
    return float(net.classify(features).softmax(dim=1).max(dim=1).values.mean())


def _class_counts(net: nn.Module, features: Tensor) -> dict[str, int]:
    """The classes that occur, in their order."""
    if not isinstance(net, FeatureNet):
        return {}
    counts = net.classify(features).argmax(dim=1).bincount(minlength=len(net.classes)).tolist()
    return {name: count for name, count in zip(net.classes, counts, strict=True) if count}
