from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_opt._lightning.probe import untouched

from ._candidates import CandidateLoss, FlatParameters, Vectorize


class CandidateFitness(CandidateLoss):
    """Evaluates fitness, and behavior where asked for, of a module at candidates for its parameters.

    ``training_step`` sees torch's global random state as :attr:`draw` seeds it, on every rank and for every candidate.
    A module with a method ``population_losses(parameters, batch)`` evaluates candidates together itself: it gets each
    parameter by its name, ``[n, *shape]``, and returns losses ``[n]``.

    Attributes:
        metric: The logged value that is the fitness; None for minus the loss.
        behavior: Whether the entry ``"behavior"`` of what ``training_step`` returns follows the fitness.
        draw: Seed of the random numbers.
    """

    metric: str | None = None
    behavior: bool = False
    draw: int = 0

    def __init__(
        self, module: pl.LightningModule, flat: FlatParameters, strategy: Any, vectorize: Vectorize, chunk: int
    ) -> None:
        super().__init__(module, flat, strategy, vectorize, chunk)
        self.module, self.flat, self.strategy, self.chunk = module, flat, strategy, chunk

    @torch.no_grad()
    def __call__(self, points: Tensor, batch: Any, batch_idx: int) -> Tensor:
        """Fitness ``[n, 1]``, or fitness and behavior ``[n, 1 + d]``, in float32 or wider."""
        together = getattr(self.module, "population_losses", None)
        if together is None or self.metric or self.behavior:
            return super().__call__(points, batch, batch_idx)
        parts = []
        for some in points.to(self.flat.dtype).split(self.chunk):
            with untouched(self.module, self.flat.device), torch.no_grad():
                torch.manual_seed(self.draw)
                with self.strategy.precision_plugin.train_step_context():
                    parts.append(-together(self.flat.views(some), batch).float()[:, None])
        return torch.cat(parts)

    def measure(self, batch_idx: int) -> Callable[[Any], Tensor]:
        """Fitness and behavior as one vector ``[1 + d]``."""
        module = self.module
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)

        def of_batch(batch: Any) -> Tensor:
            torch.manual_seed(self.draw)
            logged: dict[str, Any] = {}
            vars(module).update(  # within `untouched`, which puts them back
                log=lambda name, value, *args, **kwargs: logged.update({name: value}),
                log_dict=lambda values, *args, **kwargs: logged.update(values),
            )
            output = module.training_step(batch, batch_idx) if takes_index else module.training_step(batch)
            return torch.cat([self._fitness(output, logged), self._behavior(output)])

        return of_batch

    def _fitness(self, output: Any, logged: dict[str, Any]) -> Tensor:
        if self.metric is None:
            loss = output.get("loss") if isinstance(output, dict) else output
            value = torch.nan if loss is None else -loss
        elif self.metric in logged:
            value = logged[self.metric]
        else:
            raise MisconfigurationException(
                f"fitness is the value {self.metric!r} that training_step of {type(self.module).__name__} logs, and it"
                f" logs {', '.join(map(repr, logged)) or 'nothing'}"
            )
        return torch.as_tensor(value, device=self.flat.device).float().reshape(1)

    def _behavior(self, output: Any) -> Tensor:
        if not self.behavior:
            return torch.empty(0, device=self.flat.device)
        found = output.get("behavior") if isinstance(output, dict) else None
        if not isinstance(found, Tensor):
            raise MisconfigurationException(
                f"novelty needs training_step of {type(self.module).__name__} to return a dict whose entry 'behavior'"
                " is a tensor"
            )
        return found.detach().float().flatten()
