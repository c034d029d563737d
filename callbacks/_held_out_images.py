from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Subset


def held_out_images(trainer: Any, num: int, seed: int) -> Tensor:
    """Images of the validation data, chosen at random; the loader itself is not asked, so nothing of it changes.

    Args:
        trainer: Fitting, with validation data set up.
        num: How many.
        seed: Of the choice.

    Returns:
        ``[num, C, H, W]``, as the data give them.

    Raises:
        ValueError: If there are no validation data that can be chosen from, or too few.
    """
    loaders = CombinedLoader(trainer.val_dataloaders).flattened if trainer.val_dataloaders is not None else []
    source = next(iter(loaders), None)
    dataset: Any = getattr(source, "dataset", None)
    if source is None or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError("there are no validation data with a length to compare with")
    if len(dataset) < num:
        raise ValueError(f"{num} images are to be compared with as many of validation, which has {len(dataset)}")
    generator = torch.Generator().manual_seed(seed)  # a DataLoader without one draws from the global state
    chosen = torch.randperm(len(dataset), generator=generator)[:num].tolist()
    batches = DataLoader(Subset(dataset, chosen), batch_size=256, collate_fn=source.collate_fn, generator=generator)
    return torch.cat([batch if isinstance(batch, Tensor) else batch[0] for batch in batches])
