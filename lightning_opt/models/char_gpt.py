import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_opt._checks import check_interval
from lightning_opt.registry import register


@register("module", summary="Small GPT: pre-norm transformer with tied embeddings", paper="2002.04745")
class CharGPT(nn.Module):
    """A small transformer that predicts each token from those before it. The default has 236,000 parameters.

    The sum of a token's and a position's embedding; then blocks of causal attention and a feed-forward layer of four
    times the width with GELU, each behind a LayerNorm and added to what came in; then a LayerNorm, and the token
    embedding as output layer.

    The fused attention of torch has no second derivative. For Hessian products call the network under
    ``torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)``.

    Source: arXiv 2002.04745, fig. 1b (pre-norm); arXiv 1608.05859 (tied embeddings); initialization that of GPT-2:
    normal with standard deviation 0.02, smaller by sqrt(2 depth) in the layers that are added to their input.

    Args:
        vocab_size: Number of tokens.
        context: The longest input.
        width: Width of the embeddings.
        depth: Number of blocks.
        heads: Attention heads; divides ``width``.
        dropout: Probability to drop a unit of the embedding and of what a block adds, in training.

    Raises:
        ValueError: If a number is below 1, ``width`` is no multiple of ``heads``, or ``dropout`` is not in [0, 1); in
            ``forward``, if the input is longer than ``context``.

    Example:
        >>> CharGPT(vocab_size=66, context=64)(torch.zeros(2, 10, dtype=torch.int64)).shape
        torch.Size([2, 10, 66])
    """

    def __init__(
        self,
        vocab_size: int = 66,
        context: int = 64,
        width: int = 96,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("vocab_size", vocab_size),
            ("context", context),
            ("width", width),
            ("depth", depth),
            ("heads", heads),
        ):
            check_interval(name, value, 1)
        if width % heads:
            raise ValueError(f"width must be a multiple of heads={heads}, got {width}")
        check_interval("dropout", dropout, 0, 1, closed="[)")
        self.vocab_size = vocab_size
        self.context = context
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(_Block(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            if isinstance(module, _Block):
                for layer in (module.merge, module.shrink):
                    nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * depth))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, T, vocab_size]`` of the token behind each of ``tokens``, int64 ``[B, T]``."""
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"the input has {length} tokens, more than context={self.context}")
        x = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        return functional.linear(self.norm(self.blocks(self.dropout(x))), self.tokens.weight)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.split = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.grow = nn.Linear(width, 4 * width)
        self.shrink = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.split(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attention = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.merge(attention.transpose(1, 2).reshape(batch, length, width)))
        hidden = functional.gelu(self.grow(self.feedforward_norm(x)), approximate="tanh")
        return x + self.dropout(self.shrink(hidden))
