import math

import pytest
import torch

from lightning_opt.curvature import Guards, Step, curvature_range, guarded, step_rule


def test_the_log_line_of_the_authors():
    lr, momentum, _ = step_rule("ssgdmn", 1448.47, 2.44788)
    assert lr == pytest.approx(0.0411093, rel=2e-6)  # six digits of L and mu, as printed
    assert momentum == pytest.approx(0.921028, rel=2e-6)


@pytest.mark.parametrize("condition", [1.0, 4.0, 100.0])
def test_polyak_and_gd_reach_their_rates_on_a_quadratic(condition):
    """Errors shrink by (sqrt k - 1) / (sqrt k + 1) a step for polyak, by (k - 1) / (k + 1) for gd."""
    curvature = torch.linspace(1.0, condition, 5, dtype=torch.float64)
    root = math.sqrt(condition)
    for rule, factor in (("polyak", (root - 1) / (root + 1)), ("gd", (condition - 1) / (condition + 1))):
        lr, momentum, _ = step_rule(rule, condition, 1.0)
        # spectral radius of the two-step recursion of every eigenvalue
        beta = momentum or 0.0
        matrices = torch.stack([torch.tensor([[1 + beta - lr * h, -beta], [1.0, 0.0]]) for h in curvature.tolist()])
        radius = torch.linalg.eigvals(matrices.double()).abs().max().item()
        assert radius == pytest.approx(factor, abs=1e-3)  # a double root splits by sqrt(1e-7), float32 entries


def test_nesterov_is_the_textbook_rule():
    assert step_rule("nesterov", 16.0, 1.0) == Step(1 / 16, 3 / 5)


def test_the_effective_rate_of_our_rule_is_a_share_of_the_sharpness():
    for mu in (0.0, 0.5, 16.0):
        lr, momentum, _ = step_rule("effective", 16.0, mu)
        assert momentum == max(0.8, step_rule("nesterov", 16.0, mu).momentum)
        assert lr == pytest.approx(4 / 16 * (1 - momentum))
        assert lr <= 0.25 * 2 * (1 + momentum) / 16  # far from the edge
    assert step_rule("effective", 16.0, 0.5, fixed_momentum=0.9) == Step(pytest.approx(4 / 16 * 0.1), None)
    assert step_rule("polyak", 16.0, 4.0, fixed_momentum=0.9) == Step((2 / 6) ** 2, None)


def test_rules_are_scale_equivariant_except_the_authors():
    for rule in ("effective", "nesterov", "polyak", "gd"):
        small, large = step_rule(rule, 3.0, 0.2), step_rule(rule, 30.0, 2.0)
        assert small.lr == pytest.approx(10 * large.lr, rel=1e-14)
        assert small.momentum == pytest.approx(large.momentum, rel=1e-14) if small.momentum else rule == "gd"
    assert step_rule("ssgdmn", 30.0, 2.0).lr == pytest.approx(step_rule("ssgdmn", 3.0, 0.2).lr, rel=1e-14)


@pytest.mark.parametrize("mu", [0.0, 0.01, 0.5, 3.0])
def test_the_effective_rate_of_ssgdmn_is_pinned(mu):
    lr, momentum, _ = step_rule("ssgdmn", 3.0, mu)
    assert lr / (1 - momentum) == pytest.approx((1 + math.sqrt(mu / 3.0)) / 2) if mu else momentum == 1


def test_the_slip_in_the_authors_script():
    assert step_rule("polyak", 16.0, 4.0).momentum == pytest.approx((2 / 6) ** 2)
    assert step_rule("polyak", 16.0, 4.0, paper_bug=True).momentum == pytest.approx((2 / 8) ** 2)


def test_curvature_range():
    values, weights = torch.tensor([-9.0, -0.5, 0.001, 4.0]), torch.tensor([0.1, 0.1, 0.7, 0.1])
    assert curvature_range(values, weights) == pytest.approx((9.0, 2.25))
    assert curvature_range(values, weights, "min") == pytest.approx((9.0, 0.5))
    assert curvature_range(values, weights, "min", weight_threshold=0.8) == pytest.approx((9.0, 0.001))
    assert curvature_range(torch.tensor([4.0]), torch.tensor([1.0]), "min") == (4.0, 4.0)
    assert curvature_range(torch.tensor([5.0, 0.0]), torch.tensor([0.5, 0.5]), "min") == (5.0, 5e-8)
    assert all(map(math.isnan, curvature_range(torch.tensor([5.0, math.nan]), torch.tensor([0.5, 0.5]))))


@pytest.mark.parametrize(
    ("step", "guards", "expected"),
    [
        (Step(0.07, 0.9), Guards(), Step(0.07, 0.9)),
        (Step(9.0, 0.999), Guards(growth=1e4), Step(3.98, 0.99, ("momentum", "stability"))),
        (Step(9.0, 0.5), Guards(), Step(0.4, 0.5, ("stability", "growth"))),
        (Step(1.0, 0.75), Guards(), Step(0.2, 0.75, ("growth",))),  # 0.2 / 0.25 is twice 0.2 / 0.5
        (Step(1e-9, 0.5), Guards(lr_min=1e-8), Step(1e-8, 0.5, ("lr_min",))),
        (Step(0.3, None), Guards(lr_max=0.1), Step(0.1, None, ("lr_max",))),
        (Step(9.0, None), Guards(safety=0.5, growth=1e3), Step(1.5, None, ("stability",))),  # 0.5 * 2 * (1 + 0.5)
    ],
)
def test_guards(step, guards, expected):
    result = guarded(step, sharpness=1.0, previous=Step(0.2, 0.5), momentum=0.5, guards=guards)
    assert result.lr == pytest.approx(expected.lr)
    assert result[1:] == expected[1:]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: step_rule("nesterow", 1.0, 1.0), "rule must be one of .* Did you mean 'nesterov'"),
        (lambda: step_rule("gd", 0.0, 0.0), "sharpness must be > 0 and finite, got 0.0"),
        (lambda: step_rule("gd", 1.0, 2.0), r"mu must be in \[0, 1.0\], got 2.0"),
        (lambda: curvature_range(torch.ones(2), torch.ones(2), "mean"), "lower must be one of"),
        (lambda: curvature_range(torch.ones(2), torch.ones(3)), "two vectors of one length"),
    ],
)
def test_wrong_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
