import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional

from lightning_opt._checks import check_interval
from lightning_opt.registry import register


@register("module", summary="Prediction of the next token with cross-entropy, in bits per character")
class LanguageModel(pl.LightningModule):
    """Trains any network that maps tokens to logits of the next token with cross-entropy.

    It defines no optimizer and takes no learning rate: those come from the command line, a config, or a
    ``configure_optimizers`` of a subclass. Batches are ``(inputs, targets)``, both int64 ``[B, T]``, as
    :class:`lightning_opt.data.CharText` gives them.

    Logs ``train/loss`` by step, in nats; ``val/loss``, ``val/bits_per_character``, ``test/loss`` and
    ``test/bits_per_character`` by epoch, as means over characters and, with several ranks, over all of them. Prediction
    gives the probabilities ``[B, vocab_size]`` of the token behind each window.

    Nothing but tensors enters a checkpoint, so it loads with ``weights_only=True``; give the network again:
    ``LanguageModel.load_from_checkpoint(path, net=CharGPT())``.

    Args:
        net: Maps tokens int64 ``[B, T]`` to logits ``[B, T, vocab_size]``. Where it has attributes ``vocab_size`` and
            ``context``, they are compared with those of the data.

    Raises:
        MisconfigurationException: In ``setup``, if the data has more tokens or longer windows than the network takes.

    Example:
        >>> from lightning_opt.models import CharGPT
        >>> model = LanguageModel(CharGPT(vocab_size=5, context=8))
        >>> tokens = torch.zeros(3, 8, dtype=torch.int64)
        >>> model.predict_step((tokens, tokens)).sum(dim=1).allclose(torch.ones(3))
        True
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def setup(self, stage: str) -> None:
        """Compare the network with the data."""
        data = getattr(self.trainer, "datamodule", None)
        for name in ("vocab_size", "context"):
            needed, taken = getattr(data, name, None), getattr(self.net, name, None)
            if needed is not None and taken is not None and needed > taken:
                raise MisconfigurationException(
                    f"{type(data).__name__} has {name}={needed}, {type(self.net).__name__} takes {name}={taken}: build"
                    f" the network with {name}={needed}"
                )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, T, vocab_size]`` of tokens ``[B, T]``."""
        return self.net(tokens)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of a batch in nats, mean over its characters."""
        loss = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=batch[1].numel())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Loss and bits per character of a batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Loss and bits per character of a batch."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor] | Tensor) -> Tensor:
        """Probabilities ``[B, vocab_size]`` of the token behind the windows of a batch, with or without targets."""
        tokens = batch if isinstance(batch, Tensor) else batch[0]
        return self(tokens)[:, -1].softmax(dim=1)

    @torch.no_grad()
    def generate(
        self, prompt: Tensor, length: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue a text by drawing one token after the other.

        Args:
            prompt: Tokens ``[T]``, at least one; only the last ``net.context`` of them are looked at.
            length: Number of tokens to draw.
            temperature: Divides the logits; 0 takes the most probable token.
            generator: Draws the tokens; by default the global one of the model's device.

        Returns:
            The new tokens ``[length]``, int64.

        Raises:
            ValueError: If the prompt is empty or a number is negative.

        Cost: one forward pass a token.
        """
        check_interval("length", length, 0)
        check_interval("temperature", temperature, 0)
        if prompt.ndim != 1 or not len(prompt):
            raise ValueError(f"prompt must have the shape [T] with T >= 1, got {list(prompt.shape)}")
        training = self.net.training
        self.net.eval()
        text = prompt.to(self.device, torch.int64)
        for _ in range(length):
            logits = self(text[None, -getattr(self.net, "context", len(text)) :])[0, -1]
            if temperature == 0:
                drawn = logits.argmax().view(1)
            else:
                drawn = (logits / temperature).softmax(dim=0).multinomial(1, generator=generator)
            text = torch.cat([text, drawn])
        self.net.train(training)
        return text[len(prompt) :]

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        loss, count = self._loss(batch), batch[1].numel()
        self.log(f"{stage}/loss", loss, batch_size=count, sync_dist=True)
        bits = loss / math.log(2)
        self.log(f"{stage}/bits_per_character", bits, prog_bar=True, batch_size=count, sync_dist=True)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return functional.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())
