from collections.abc import Callable

import torch
from torch import Tensor

from .parametrization import LossWeight, loss_weight
from .process import per_sample


def denoising_score_matching(
    epsilon: Tensor,
    noise: Tensor,
    rho: Tensor,
    weight: LossWeight = "edm",
    log_std: float | Tensor = 1.0,
) -> Tensor:
    r"""The multiplicative denoising score-matching loss of each sample, the mean over its entries.

    .. math::
        \lambda(t) \left(x_t s_\theta(x_t, t) - (-1 - \varepsilon / \rho)\right)^2
        = \frac{\lambda(t)}{v(t)} (\hat\varepsilon - \varepsilon)^2

    Its minimiser is Hyvarinen's score :math:`h = x \nabla \log p_t`, whatever the weight. A network's output becomes
    :math:`\hat\varepsilon` by :meth:`Parametrization.epsilon`. Compute it in float32 or more, autocast off.

    Args:
        epsilon: The predicted noise, shape (n, ...).
        noise: The noise that was added.
        rho: Noise level of each sample, shape (n,).
        weight: :math:`\lambda`, see :func:`loss_weight`: ``"edm"``, ``"v"``, or ``"v2"``, the authors'.
        log_std: Standard deviation of log x0, for ``"edm"``; broadcasts with ``noise``.

    Returns:
        Shape (n,).

    Raises:
        ValueError: If the shapes differ or the weight is unknown.

    Source: arXiv:2510.02730, the M-DSM loss. The authors' code draws the noise at step k and weighs it as step k + 1;
    here both are at one time.

    Example:
        >>> noise = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
        >>> denoising_score_matching(torch.zeros(2, 2), noise, torch.tensor([0.5, 1.0]), "v2")
        tensor([0.2500, 2.0000])
    """
    if epsilon.shape != noise.shape:
        raise ValueError(f"epsilon must have the shape of noise, {tuple(noise.shape)}, got {tuple(epsilon.shape)}")
    factor = loss_weight(weight, per_sample(rho, noise), log_std)
    return (factor * (epsilon - noise) ** 2).flatten(1).mean(1)


def explicit_score_matching(hyvarinen: Tensor, true_hyvarinen: Tensor) -> Tensor:
    r"""The squared distance of each sample to the true score, :math:`\sum_i (h_{\theta,i} - h_i)^2`.

    It differs in the mean from the sum form of :func:`denoising_score_matching` with :math:`\lambda = 1` by a constant.

    Args:
        hyvarinen: The model's x times Stein score, shape (n, ...).
        true_hyvarinen: The true one.

    Returns:
        Shape (n,).
    """
    return ((hyvarinen - true_hyvarinen) ** 2).flatten(1).sum(1)


def implicit_score_matching(stein: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    r"""Score matching for positive data, without noise and without the true score.

    .. math::
        \sum_i 2 x_i \psi_i + x_i^2 \,\partial_i \psi_i + \tfrac{1}{2} x_i^2 \psi_i^2

    Its mean is half that of :func:`explicit_score_matching` less :math:`\tfrac{1}{2} E \sum_i h_i^2`, where
    :math:`x^2 p\,\psi` vanishes at zero and infinity.

    Args:
        stein: The model :math:`\psi` of the Stein score; every sample's output depends on that sample alone.
        x: Positive data, shape (n, ...).

    Returns:
        Shape (n,), differentiable in the model's parameters.

    Cost: One backward pass for each entry of a sample: for data of few dimensions.

    Source: Hyvarinen, Some extensions of score matching, 2007, the non-negative form.

    Example:
        >>> implicit_score_matching(lambda x: -x, torch.tensor([[2.0]]))  # 2 * 2 * (-2) + 4 * (-1) + 4 * 4 / 2
        tensor([-4.], grad_fn=<SumBackward1>)
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        psi = stein(x)
        flat = psi.flatten(1)
        diagonal = torch.stack(
            [
                torch.autograd.grad(flat[:, i].sum(), x, create_graph=True, materialize_grads=True)[0].flatten(1)[:, i]
                for i in range(flat.shape[1])
            ],
            dim=1,
        )
        points = x.detach().flatten(1)
        return (2 * points * flat + points**2 * (diagonal + 0.5 * flat**2)).sum(1)
