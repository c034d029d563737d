"""Every update against its reference in ``lightning_opt.optim``, through the optimizers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_opt.optim import AdaBelief, DiffGrad, ExponentiatedAdamW, ExponentiatedSGD, Lion, LionK, ProxSGD

SETTINGS: dict[str, tuple[type, dict[str, Any]]] = {
    "adabelief": (AdaBelief, {"weight_decay": 0.1}),
    "adabelief amsgrad": (AdaBelief, {"weight_decay": 0.1, "decoupled": False, "amsgrad": True, "maximize": True}),
    "adabelief rectify": (AdaBelief, {"rectify": True, "eps": 1e-8}),
    "diffgrad": (DiffGrad, {"weight_decay": 0.1}),
    "diffgrad relative": (DiffGrad, {"friction": "relative", "kappa": 2.0, "decoupled": True}),
    "diffgrad amsgrad": (DiffGrad, {"eps_mode": "authors", "amsgrad": True}),
    "diffgrad relative amsgrad": (DiffGrad, {"friction": "relative", "amsgrad": True}),
    "lion": (Lion, {"weight_decay": 1.0}),
    "lion soft": (LionK, {"kernel": "soft", "kernel_args": {"e": 0.3}}),
    "lion huber": (LionK, {"kernel": "huber", "kernel_args": {"e": 0.5}, "weight_decay": 1.0}),
    "lion relativistic": (LionK, {"kernel": "relativistic", "kernel_args": {"e": 0.5}}),
    "lion quadratic": (LionK, {"kernel": "quadratic"}),
    "eg": (ExponentiatedSGD, {"weight_decay": 0.1}),
    "eg momentum": (ExponentiatedSGD, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "max_log_step": 1e-3}),
    "eg nesterov": (ExponentiatedSGD, {"momentum": 0.9, "nesterov": True, "max_log_step": None, "min_abs": 0.1}),
    "eg gd_sign": (ExponentiatedSGD, {"variant": "gd_sign", "weight_decay": 0.1}),
    "eg hyper": (ExponentiatedSGD, {"variant": "hyper", "beta": 0.1, "momentum": 0.5}),
    "eg additive": (ExponentiatedSGD, {"additive": True, "momentum": 0.9, "maximize": True}),
    "eg adamw": (ExponentiatedAdamW, {"weight_decay": 0.1}),
    "eg adamw amsgrad": (ExponentiatedAdamW, {"amsgrad": True, "max_log_step": 0.005}),
    "eg adamw additive": (ExponentiatedAdamW, {"additive": True, "amsgrad": True}),
    "prox l1": (ProxSGD, {"prox": "l1", "strength": 0.5, "weight_decay": 0.1}),
    "prox box": (ProxSGD, {"prox": "box", "strength": 0.5, "maximize": True}),
}


def draw(steps: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[list[Tensor]]]:
    """A matrix that spans several vectors of the processor, another one transposed, and for each step their gradients.

    A gradient is a signal of each coordinate's own size plus noise. Numbers are those of ``dtype`` in any case.
    """
    generator = torch.Generator().manual_seed(0)

    def normal() -> list[Tensor]:
        first, second = torch.randn(37, 41, generator=generator), torch.randn(23, 67, generator=generator).t()
        return [first.to(dtype), second.to(dtype)]

    params, signals = normal(), [x.exp() for x in normal()]
    return params, [[s * (0.3 + x) for s, x in zip(signals, normal(), strict=True)] for _ in range(steps)]


def run(
    setting: str, params: list[Tensor], gradients: list[list[Tensor]], *, fused: bool, **options: Any
) -> list[dict[str, Tensor]]:
    """Each parameter and its states after the steps."""
    cls, own_options = SETTINGS[setting]
    own = [nn.Parameter(p.clone(memory_format=torch.preserve_format)) for p in params]
    optimizer = cls(own, **{"lr": 1e-2, **own_options, **options}, fused=fused)
    for step in gradients:
        for p, g in zip(own, step, strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
    return [{"p": p.detach(), **optimizer.state[p]} for p in own]


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


@pytest.mark.parametrize("setting", SETTINGS)
def test_error_over_100_steps_is_that_of_float32(setting):
    params, gradients = draw(100)
    lr = 1e-3  # no weight may leave the range of float32
    exact = run(setting, double(params), gradients, fused=False, lr=lr)
    single = run(setting, params, gradients, fused=False, lr=lr)
    fused = run(setting, params, gradients, fused=True, lr=lr)
    for z, y, x in zip(exact, single, fused, strict=True):
        assert x.keys() == z.keys()
        for name in x:
            assert x[name].dtype == torch.float32
            error, allowed = (x[name] - z[name]).norm(), 1.5 * (y[name] - z[name]).norm()
            assert error <= allowed, name


@pytest.mark.parametrize("setting", SETTINGS)
def test_float64_equals_the_reference(setting):
    params, gradients = draw(3)
    expected = run(setting, double(params), gradients, fused=False)
    actual = run(setting, double(params), gradients, fused=True)
    for x, y in zip(actual, expected, strict=True):
        for name in x:  # three steps of about ten roundings of 1e-16 each, in terms of size 10 at most
            torch.testing.assert_close(x[name], y[name], rtol=1e-14, atol=3e-14)


@pytest.mark.parametrize("setting", ["lion", "lion soft"])
def test_signs_equal_those_of_float64(setting):
    params, gradients = draw(100)
    cls, options = SETTINGS[setting]
    flips, lr = 0, 1e-2
    [p, _], [q, _] = [nn.Parameter(x) for x in params], [nn.Parameter(x.double()) for x in params]
    optimizer, reference = cls([p], lr=lr, **options, fused=True), cls([q], lr=lr, **options, fused=False)
    for [g, _] in gradients:
        p.grad, q.grad = g, g.double()
        optimizer.step()
        reference.step()
        flips += ((p - q).abs() > lr / 2).sum().item()
        p.data.copy_(q)  # so that every step is judged alone
        optimizer.state[p]["exp_avg"].copy_(reference.state[q]["exp_avg"])
    assert flips <= 1e-4 * p.numel() * len(gradients)


PRECISIONS = {
    "parameters": (torch.bfloat16, {}),
    "parameters and states": (torch.bfloat16, {"state_dtype": "bfloat16"}),
    "states": (torch.float32, {"state_dtype": "bfloat16"}),
    "states of float64": (torch.float64, {"state_dtype": "bfloat16"}),
}


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("setting", ["adabelief amsgrad", "eg adamw"])
def test_bfloat16_is_rounded_as_the_reference_does(setting, precision, stochastic):
    dtype, options = PRECISIONS[precision]
    params, gradients = draw(3, dtype)
    options = {**options, "stochastic_rounding": stochastic}
    expected = run(setting, params, gradients, fused=False, **options)
    actual = run(setting, params, gradients, fused=True, **options)
    for x, y in zip(actual, expected, strict=True):
        for name in x:
            assert x[name].dtype == y[name].dtype
            if x[name].dtype == torch.bfloat16:
                # Before rounding they differ by units of 2^-24: about one of 2^16 falls on the other side, by chance.
                assert (x[name] != y[name]).sum() <= 2
            else:
                torch.testing.assert_close(x[name], y[name], rtol=1e-6, atol=1e-4)  # of the few that differ


def test_stochastic_rounding_is_unbiased_and_drawn_anew_each_step():
    n, fraction = 1 << 15, 0.3
    p = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    options = {"kernel": "quadratic", "betas": (0.0, 0.0), "stochastic_rounding": True, "fused": True}
    optimizer = LionK([p], lr=fraction * 2**-7, **options)  # bfloat16 has 1 and 1 + 2^-7
    p.grad = -torch.ones_like(p)
    ups = []
    for _ in range(2):
        p.data.fill_(1.0)
        optimizer.step()
        assert set(p.detach().unique().tolist()) == {1.0, 1.0 + 2**-7}
        ups.append(p.detach() > 1)
        assert abs(ups[-1].double().mean() - fraction) < 4 * (fraction * (1 - fraction) / n) ** 0.5  # standard errors
    both = (ups[0] & ups[1]).double().mean()
    assert abs(both - fraction**2) < 4 * (fraction**2 / n) ** 0.5


@pytest.mark.parametrize("setting", SETTINGS)
def test_non_finite_gradients_show_as_in_the_reference(setting):
    params = [torch.tensor([1.0, -1.0, 0.5, 1.0, -2.0, 1.0, 0.0])]
    nan, inf = float("nan"), float("inf")
    gradients = [[torch.tensor([nan, nan, inf, -inf, inf, 1.0, 1.0])], [torch.ones(7)]]
    [expected] = run(setting, params, gradients, fused=False)
    [actual] = run(setting, params, gradients, fused=True)
    assert actual["p"][:2].isnan().all()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("limit", [None, 0.5])
def test_exponentials_are_accurate_over_all_exponents(limit):
    x = torch.linspace(-86.5, 86.5, 100_001)
    p = nn.Parameter(torch.linspace(1.0, 2.0, 100_001))
    start, exponent = p.detach().double(), x.double() if limit is None else x.double().clamp(-limit, limit)
    p.grad = -x
    ExponentiatedSGD([p], lr=1.0, max_log_step=limit, min_abs=0.0, fused=True).step()
    error = (p.detach() - start * exponent.exp()).abs() / (start * exponent.exp() * 2**-23)
    assert error.max() < 1.5  # half a unit for the result, as much for its summand, a bit for the polynomial


@pytest.mark.parametrize("p", [0.0, 1.0, -1e-3, 1e3])
def test_hyperbolic_functions_are_accurate_over_all_exponents(p):
    x = torch.cat([torch.linspace(-80.0, 80.0, 20_001), torch.logspace(-30, 0, 1000)])
    w = nn.Parameter(torch.full_like(x, p))
    w.grad = x
    ExponentiatedSGD([w], lr=1.0, variant="hyper", beta=1.0, max_log_step=None, fused=True).step()
    # p cosh x - sqrt(p^2 + 1) sinh x cancels where it crosses zero: in units of its larger term
    x, start = x.double(), torch.tensor(p).double()
    expected = (start.asinh() - x).sinh()
    scale = torch.maximum(start.abs() * x.cosh(), (start.square() + 1).sqrt() * x.sinh().abs())
    error = (w.detach() - expected).abs() / (scale * 2**-23)
    assert error.max() < 5  # ten roundings of at most half a unit
