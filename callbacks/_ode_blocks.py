"""Finding the layers of a LightningModule that solve a differential equation."""

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_opt._checks import nearest


def find_blocks(module: nn.Module, block: str | nn.Module | None, who: str) -> dict[str, Any]:
    """The blocks by their names in the module.

    Args:
        module: Where to look.
        block: The name of one, one itself, or None for all of them: every module with the block protocol of
            :class:`lightning_opt.ode.NeuralODE`.
        who: Asks.

    Raises:
        MisconfigurationException: If there is none, or not this one.
    """
    # what torch.compile wraps is the block, and its wrapper has the same attributes
    found = {_plain(name): m for name, m in module.named_modules() if is_block(m) and _uncompiled(m) is m}
    if isinstance(block, nn.Module):
        block = _uncompiled(block)
    have = f"{type(module).__name__} has {', '.join(map(repr, found)) or 'none'}"
    if block is None:
        if not found:
            raise MisconfigurationException(
                f"{who} found no block that solves a differential equation in {type(module).__name__}: use"
                " lightning_opt.ode.NeuralODE, or a module with its protocol"
            )
        return found
    if isinstance(block, str):
        if block not in found:
            close = nearest(block, found)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise MisconfigurationException(f"{who}: {block!r} is no block that solves an equation; {have}.{hint}")
        return {block: found[block]}
    for name, candidate in found.items():
        if candidate is block:
            return {name: candidate}
    raise MisconfigurationException(f"{who}: the {type(block).__name__} given is no block of the module; {have}")


def _uncompiled(module: nn.Module) -> nn.Module:
    """What ``torch.compile`` wraps, or the module itself."""
    return dict(module.named_children()).get("_orig_mod", module)


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def is_block(module: nn.Module) -> bool:
    """Whether a module has the block protocol."""
    return all(hasattr(module, name) for name in ("last_solve", "estimates", "step", "rtol", "atol"))
