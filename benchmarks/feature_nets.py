"""Train the feature nets that the package ships, and measure how well they see what is wrong with images.

    LIGHTNING_OPT_DATA=DIR python benchmarks/feature_nets.py             # all of it; five minutes on one core
    LIGHTNING_OPT_DATA=DIR python benchmarks/feature_nets.py digits8     # or a part: digits8, grey28, comparison

Seeds are fixed. Each net is trained on training images only (of Kuzushiji-MNIST, of which the test images alone are
needed, on 8,000 of them) and judged on held-out images: accuracy; the Frechet distances of 1,000 training images and of
1,000 other held-out images to 1,000 held-out ones; and, as multiples of the latter, the distances of held-out images
with a defect. The comparison has the net for 28x28 beside nets that saw one data set alone, as many images of it, and
beside one that saw no Kuzushiji. The architecture of digits8 was chosen among a dozen by these figures.

Writes ``lightning_opt/metrics/weights/*.pt`` and ``benchmarks/results/feature_nets_*.json``.
"""

import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from _runner import write_result
from torch import Tensor
from torch.nn import functional

from lightning_opt.data import KMNIST, MNIST, Digits, FashionMNIST, stratified_order
from lightning_opt.metrics import FeatureNet, extract_features, frechet_distance

WEIGHTS = Path(__file__).parents[1] / "lightning_opt" / "metrics" / "weights"
KUZUSHIJI_HELD_OUT = 2000
SPLITS = 5
STEPS = 3000  # of the shared net for 28x28


class Images(NamedTuple):
    """A data set: images ``[N, 1, H, W]`` in [0, 1] and labels, to train on and held out."""

    classes: tuple[str, ...]
    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


class Architecture(NamedTuple):
    size: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    features: int
    dropout: float
    none: bool
    """Whether one more class holds what is no image of the data."""


DIGITS8 = Architecture(size=8, channels=(16, 32, 32), strides=(1, 1, 2), features=32, dropout=0.5, none=True)
GREY28 = Architecture(size=28, channels=(16, 32, 32, 48), strides=(1, 2, 2, 2), features=48, dropout=0.2, none=False)


def main(which: list[str]) -> None:
    torch.set_num_threads(1)
    WEIGHTS.mkdir(exist_ok=True)
    for name in which:
        {"digits8": make_digits8, "grey28": make_grey28, "comparison": compare}[name]()


def make_digits8() -> None:
    sets = {"digits": digits()}
    save(train(DIGITS8, sets, steps=1500, batch=64, shift=1), sets, "digits8")
    write_result("feature_nets_digits8", {"nets": {"digits8": judge(FeatureNet.load("digits8"), sets)}})


def make_grey28() -> None:
    sets = images_28x28()
    save(train(GREY28, sets, steps=STEPS, batch=128, shift=2), sets, "grey28")


def compare() -> None:
    sets = images_28x28()
    result = {"grey28": judge(FeatureNet.load("grey28"), sets)}
    for names in (["mnist"], ["fashion"], ["kuzushiji"], ["mnist", "fashion"]):
        some = {name: sets[name] for name in names}
        net = train(GREY28, some, steps=len(some) * STEPS // len(sets), batch=128, shift=2)
        result[f"{' and '.join(names)} alone"] = judge(net, sets)
    write_result("feature_nets_grey28", {"nets": result})


def images_28x28() -> dict[str, Images]:
    return {"mnist": idx_images(MNIST), "fashion": idx_images(FashionMNIST), "kuzushiji": kuzushiji()}


def digits() -> Images:
    data = Digits()
    (train_images, train_labels), (test_images, test_labels) = data.load("train"), data.load("test")
    return Images(data.classes, train_images[:, None] / 16, train_labels, test_images[:, None] / 16, test_labels)


def idx_images(module: type[MNIST] | type[FashionMNIST]) -> Images:
    data = module()
    (train_images, train_labels), (test_images, test_labels) = data.load("train"), data.load("test")
    return Images(
        data.classes,
        train_images[:, None] / 255,
        train_labels.long(),
        test_images[:, None] / 255,
        test_labels.long(),
    )


def kuzushiji() -> Images:
    """The test images, whose first 2,000 in stratified order are held out."""
    data = KMNIST()
    images, labels = data.load("test")
    images, labels = images[:, None] / 255, labels.long()
    order = stratified_order(labels, seed=0)
    held_out, rest = order[:KUZUSHIJI_HELD_OUT], order[KUZUSHIJI_HELD_OUT:]
    return Images(data.classes, images[rest], labels[rest], images[held_out], labels[held_out])


def train(architecture: Architecture, sets: dict[str, Images], *, steps: int, batch: int, shift: int) -> FeatureNet:
    """Cross-entropy on all classes of all data sets, in equal shares, of images shifted by up to ``shift`` pixels."""
    generator = torch.Generator().manual_seed(0)
    classes = [f"{name}/{label}" if len(sets) > 1 else label for name, data in sets.items() for label in data.classes]
    if architecture.none:
        classes.append("none")
    weights = initial_weights(architecture, len(classes), generator)
    net = FeatureNet(weights, architecture.strides, architecture.size, classes)
    optimizer = torch.optim.AdamW(weights.values(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    share = batch // len(sets)
    for _ in range(steps):
        parts, labels, first = [], [], 0
        for data in sets.values():
            chosen = torch.randint(len(data.train), (share,), generator=generator)
            parts.append(shifted(data.train[chosen], shift, generator))
            labels.append(data.train_labels[chosen] + first)
            first += len(data.classes)
        if architecture.none:
            parts.append(spoiled(torch.cat(parts)[: batch // 2], generator))
            labels.append(torch.full((batch // 2,), first))
        features = net(torch.cat(parts))
        kept = torch.rand(features.shape, generator=generator) > architecture.dropout
        logits = net.classify(features * kept / (1 - architecture.dropout))
        optimizer.zero_grad()
        functional.cross_entropy(logits, torch.cat(labels)).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        for value in weights.values():
            value.requires_grad_(False)
        # features are positively homogeneous in the last hidden layer
        images = torch.cat([data.train[: 5000 // len(sets)] for data in sets.values()])
        scale = math.sqrt(net.num_features / float(extract_features(images, net).var(dim=0).sum()))
        weights["features_weight"] *= scale
        weights["features_bias"] *= scale
        weights["classes_weight"] /= scale
    return net


def initial_weights(architecture: Architecture, classes: int, generator: torch.Generator) -> dict[str, Tensor]:
    """He's normal initialization."""
    shapes, inputs, side = {}, 1, architecture.size
    for i, (outputs, stride) in enumerate(zip(architecture.channels, architecture.strides, strict=True)):
        shapes[f"conv{i}"] = (outputs, inputs, 3, 3)
        inputs, side = outputs, -(-side // stride)
    shapes["features"] = (architecture.features, inputs * side * side)
    shapes["classes"] = (classes, architecture.features)
    weights = {}
    for name, shape in shapes.items():
        scale = math.sqrt((1 if name == "classes" else 2) / math.prod(shape[1:]))
        weights[f"{name}_weight"] = (scale * torch.randn(shape, generator=generator)).requires_grad_()
        weights[f"{name}_bias"] = torch.zeros(shape[0]).requires_grad_()
    return weights


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to ``most`` pixels in both directions, zeros moving in."""
    size = images.shape[-1]
    padded = functional.pad(images, (most,) * 4)
    rows, columns = torch.randint(2 * most + 1, (2, len(images), 1), generator=generator) + torch.arange(size)
    return padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def spoiled(images: Tensor, generator: torch.Generator) -> Tensor:
    """Noise, images with shuffled pixels, and images laid over each other, in equal shares."""
    noise, shuffled, over = images.tensor_split(3)
    order = torch.rand(shuffled.shape, generator=generator).flatten(1).argsort(dim=1)
    shuffled = shuffled.flatten(1).gather(1, order).view_as(shuffled)
    over = torch.maximum(over, over.roll(1, dims=0))
    return torch.cat([torch.rand(noise.shape, generator=generator), shuffled, over])


def save(net: FeatureNet, sets: dict[str, Images], name: str) -> None:
    content = {
        "weights": dict(net.named_buffers()),
        "strides": list(net.strides),
        "size": net.image_shape[-1],
        "classes": list(net.classes),
        "accuracy": {data: round(value, 4) for data, value in accuracies(net, sets).items()},
    }
    path = WEIGHTS / f"{name}.pt"
    torch.save(content, path)
    print(path, path.stat().st_size, "bytes")


def accuracies(net: FeatureNet, sets: dict[str, Images]) -> dict[str, float]:
    """Share of the held-out images whose class is found among all classes of the net."""
    found, first = {}, 0
    for name, data in sets.items():
        classes = net.classify(extract_features(data.held_out, net)).argmax(dim=1)
        found[name] = float((classes == data.held_out_labels + first).double().mean())
        first += len(data.classes)
    return found


def judge(net: FeatureNet, sets: dict[str, Images]) -> dict[str, dict[str, float]]:
    """What a net sees in each data set; its own classes or not, so by a linear classifier on its features."""
    rows = {name: judge_on(net, data) for name, data in sets.items()}
    for name, row in rows.items():
        print(
            f"{net.classes[0]:10} ... {net.classes[-1]:14} {name:10}",
            *(f"{k} {v:.4g}" for k, v in row.items()),
            sep="  ",
        )
    return rows


def judge_on(net: FeatureNet, data: Images) -> dict[str, float]:
    count = min(1000, len(data.held_out) // 2)
    # the distances of real images to real images, the mean over splits; MNIST's first images are not like its others
    held_out, real = (
        extract_features(images[stratified_order(labels, seed=1)[:5000]], net)
        for images, labels in ((data.held_out, data.held_out_labels), (data.train, data.train_labels))
    )
    floors, trains = [], []
    for seed in range(SPLITS):
        order, other = (torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)) for x in (held_out, real))
        reference = held_out[order[:count]]
        floors.append(frechet_distance(held_out[order[count : 2 * count]], reference, None))
        trains.append(frechet_distance(real[other[:count]], reference, None))
    floor = statistics.mean(floors)
    row = {
        "images": count,
        "linear_accuracy": linear_accuracy(net, data),
        "held_out": floor,
        "held_out_sd": statistics.stdev(floors),
        "train": statistics.mean(trains),
    }
    # multiples of that, of other held-out images with a defect
    generator = torch.Generator().manual_seed(2)
    order = stratified_order(data.held_out_labels, seed=1)
    reference, other = data.held_out[order[:count]], data.held_out[order[count : 2 * count]]
    present = (data.held_out_labels[order[count : 2 * count]] != 0).nonzero()[:, 0]
    others = present[torch.randint(len(present), (count,), generator=generator)]
    defective = {name: defect(other, generator) for name, defect in DEFECTS.items()}
    defective["class 0 missing"] = other[others]
    multiples = {name: frechet_distance(images, reference, net) / floor for name, images in defective.items()}
    return {**row, **multiples, "geometric mean": statistics.geometric_mean(multiples.values())}


def noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Nothing but noise."""
    return torch.rand(images.shape, generator=generator)


def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    return (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    return functional.avg_pool2d(images, 3, stride=1, padding=1)


def rotated(images: Tensor, generator: torch.Generator) -> Tensor:
    angles = math.radians(20) * (2 * torch.rand(len(images), generator=generator) - 1)
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros(len(images))
    matrices = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = functional.affine_grid(matrices, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False).clamp(0, 1)


def pieced(images: Tensor, generator: torch.Generator) -> Tensor:
    """The upper half of one image on the lower half of another."""
    half = images.shape[2] // 2
    return torch.cat([images[:, :, :half], images.roll(1, dims=0)[:, :, half:]], dim=2)


def faint(images: Tensor, generator: torch.Generator) -> Tensor:
    return 0.8 * images


DEFECTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise": noise,
    "noisy": noisy,
    "blurred": blurred,
    "rotated": rotated,
    "pieced": pieced,
    "faint": faint,
}


def linear_accuracy(net: FeatureNet, data: Images) -> float:
    """Accuracy on held-out images of ridge regression from the features of 5,000 training images to their classes."""

    def design(images: Tensor) -> Tensor:
        return functional.pad(extract_features(images, net), (0, 1), value=1.0)

    order = stratified_order(data.train_labels, seed=1)[:5000]
    x, y = design(data.train[order]), functional.one_hot(data.train_labels[order]).double()
    coefficients = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    return float(((design(data.held_out) @ coefficients).argmax(dim=1) == data.held_out_labels).double().mean())


if __name__ == "__main__":
    main(sys.argv[1:] or ["digits8", "grey28", "comparison"])
