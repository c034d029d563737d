import importlib.util
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_opt._checks import check_choice, check_interval

from ._images import check_images
from .feature_net import FeatureNet, FeatureNetName

FeatureName = Literal["digits8", "grey28", "inception"]


def load_features(features: FeatureName | nn.Module) -> nn.Module:
    """The network whose outputs are compared.

    Args:
        features: ``"digits8"`` or ``"grey28"``: the :class:`FeatureNet` of that name. ``"inception"``: the 2,048
            features of Inception v3 that the FID is defined by, for images of any size, gray ones repeated to three
            channels; the package torch-fidelity brings the network and fetches its weights (91 MB) at first use. Or a
            module of your own that maps images to ``[N, d]`` and has d as its attribute ``num_features``.

    Raises:
        ValueError: If the name is unknown or the module has no ``num_features``.
        ModuleNotFoundError: If ``"inception"`` is asked for without torch-fidelity.
        RuntimeError: If the weights of Inception are neither at hand nor can be fetched.

    Example:
        >>> load_features("grey28").num_features
        48
    """
    if isinstance(features, nn.Module):
        if not isinstance(getattr(features, "num_features", None), int):
            raise ValueError(
                f"features must have an attribute num_features, an int; {type(features).__name__} has none"
            )
        return features
    check_choice("features", features, get_args(FeatureName))
    return _Inception() if features == "inception" else FeatureNet.load(features)


def extract_features(
    images: Tensor, features: FeatureName | Literal["auto"] | nn.Module = "auto", *, batch_size: int = 500
) -> Tensor:
    """Features of images, in float64 and without gradients.

    Args:
        images: ``[N, C, H, W]``, floating point in [0, 1].
        features: As for :func:`load_features`; ``"auto"`` takes the shipped net for images of this size.
        batch_size: Images at a time.

    Returns:
        ``[N, d]`` on the device of the images.

    Raises:
        ValueError: If images are not in [0, 1] or no shipped net is for their size.

    Example:
        >>> extract_features(torch.rand(7, 1, 8, 8)).shape
        torch.Size([7, 32])
    """
    net = features_for(images, features)
    check_interval("batch_size", batch_size, 1)
    with torch.no_grad():
        return torch.cat([net(part).double() for part in images.split(batch_size)])


def features_for(
    images: Tensor, features: FeatureName | Literal["auto"] | nn.Module, name: str = "images"
) -> nn.Module:
    """The network for these images; ``name`` is what the user called them. One of the user's own stays where it is."""
    check_images(name, images)
    if features == "auto":
        if tuple(images.shape[1:]) not in _SHIPPED:
            raise ValueError(
                f"{name} must be of shape [N, 1, 8, 8] or [N, 1, 28, 28] for features='auto', got {list(images.shape)};"
                " for other images set features='inception' or to a module of your own"
            )
        features = _SHIPPED[tuple(images.shape[1:])]
    net = load_features(features)
    check_images(name, images, getattr(net, "image_shape", None))
    return net if net is features else net.to(images.device)


_SHIPPED: dict[tuple[int, ...], FeatureNetName] = {(1, 8, 8): "digits8", (1, 28, 28): "grey28"}


class _Inception(nn.Module):
    """torchmetrics' Inception v3 for gray or color images in [0, 1]."""

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        if importlib.util.find_spec("torch_fidelity") is None:
            raise ModuleNotFoundError(
                "features='inception' needs torch-fidelity: pip install torch-fidelity; or set features='grey28' for"
                " gray images of 28x28, 'digits8' for 8x8, which need nothing",
                name="torch_fidelity",
            )
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            self.net = NoTrainInceptionV3(name="inception-v3-compat", features_list=[str(self.num_features)])
        except OSError as error:
            raise RuntimeError(
                f"features='inception': the weights of Inception v3 could not be fetched ({error}); run once with a"
                f" network, or put weights-inception-2015-12-05-6726825d.pth into {torch.hub.get_dir()}/checkpoints, or"
                " set features='grey28' for gray images of 28x28, 'digits8' for 8x8"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        check_images("images", images)
        if images.shape[1] not in (1, 3):
            raise ValueError(f"images must have 1 or 3 channels for features='inception', got {images.shape[1]}")
        return self.net((images * 255).byte().expand(-1, 3, -1, -1))  # rounded down, as torchmetrics does
