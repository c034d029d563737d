from typing import Any

from torch import Tensor


def log_picture(logger: Any, name: str, picture: Tensor, step: int) -> bool:
    """Give a picture to a logger of Lightning, in the manner of each.

    Args:
        logger: Any logger.
        name: What the picture is called there.
        picture: uint8 ``[height, width, 3]``.
        step: The optimizer step.

    Returns:
        Whether it takes pictures; those that write text alone do not.
    """
    if callable(getattr(logger, "log_image", None)):  # Weights & Biases
        logger.log_image(key=name, images=[picture.numpy()], step=step)
        return True
    experiment: Any = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "add_image", None)):  # TensorBoard
        experiment.add_image(name, picture.numpy(), step, dataformats="HWC")
    elif callable(getattr(experiment, "log_image", None)) and hasattr(logger, "run_id"):  # MLflow
        experiment.log_image(logger.run_id, picture.numpy(), key=name.replace("/", "_"), step=step)
    elif callable(getattr(experiment, "log_image", None)):  # Comet
        experiment.log_image(picture.numpy(), name=name, step=step)
    elif type(logger).__name__ == "NeptuneLogger":
        from neptune.types import File  # type: ignore[import-not-found]

        experiment[name].append(File.as_image(picture.numpy() / 255), step=step)
    else:
        return False
    return True
