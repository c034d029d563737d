"""Grids, coefficients, tableaus and plans of DEIS, in float64, against quadrature, closed forms and known problems."""

import math

import pytest
import torch

from lightning_opt.diffusion import deis_coefficients, ipndm_coefficients, network_calls
from lightning_opt.diffusion.deis import ALGORITHMS, TABLEAUS
from tests.reference.deis import GaussianMixture, coefficient, power_grid, run

F64 = torch.float64
SIGMA = 0.8
RHO = power_grid(1.6, 0.025, 9)
MULTISTEP = ("t_ab", "rho_ab", "logrho_ab", "ipndm")


def gbm_time(rho):
    """Constant volatility: rho = sigma sqrt(t)."""
    return (rho / SIGMA) ** 2


def vp_time(rho, low=0.1, high=20.0):
    """The linear VP schedule, beta(t) = low + (high - low) t: log(1 + rho^2) = low t + (high - low) t^2 / 2."""
    return ((low**2 + 2 * (high - low) * torch.log1p(rho**2)).sqrt() - low) / (high - low)


def vp_alpha(t, low=0.1, high=20.0):
    return math.exp(-(low * t + (high - low) * t**2 / 2) / 2)


def plan(algorithm, rho=RHO, order=4, **options):
    return network_calls(rho, algorithm, order, time=gbm_time, **options)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_coefficients_in_t_are_the_papers_integrals(order):
    """For VP in x: the sheet's transition and weight, integrated adaptively; multiplied by a(t') ours are theirs."""
    rho = power_grid(30.0, 0.02, 6, 5)
    ours = deis_coefficients(rho, order, "t", time=vp_time)
    t = vp_time(rho).tolist()

    def transition(to, start):
        return vp_alpha(to) / vp_alpha(start)

    def weight(u):  # g^2 / (2 s)
        return (0.1 + 19.9 * u) / (2 * math.sqrt(1 - vp_alpha(u) ** 2))

    for i in range(6):
        past = [t[i - k] for k in range(min(order, i + 1))]
        for j in range(len(past)):
            expected = coefficient(past, t[i + 1], j, transition, weight)
            # coefficients of x are at most 3; quad asks for 1e-13
            assert ours[i, j].item() * vp_alpha(t[i + 1]) == pytest.approx(expected, abs=1e-12)
        assert not ours[i, len(past) :].any()


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_polynomials_in_t_are_integrated_exactly_for_gbm(order):
    """Constant volatility has the closed form int u^k sigma / (2 sqrt u) du = sigma u^(k + 1/2) / (2k + 1)."""
    coefficients = deis_coefficients(RHO, order, "t", time=gbm_time)
    t = gbm_time(RHO)
    for i in range(order - 1, 9):
        for k in range(order):
            past = t[i - torch.arange(order)]
            moment = SIGMA * (t[i + 1] ** (k + 0.5) - t[i] ** (k + 0.5)) / (2 * k + 1)
            # rounding of the weights, some 1e-16 each of a sum of size t^k
            assert (coefficients[i] * past**k).sum().item() == pytest.approx(moment.item(), abs=1e-14 * 4**k)


@pytest.mark.parametrize(("basis", "last"), [("rho", 0.025), ("rho", 0.0), ("logrho", 0.025), ("logrho", 0.0)])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_polynomials_in_rho_and_log_rho_are_integrated_exactly(order, basis, last):
    rho = torch.cat([RHO[:-1], torch.tensor([last], dtype=F64)])
    coefficients = deis_coefficients(rho, order, basis)

    def moment(k, u):  # the antiderivative of u^k or log(u)^k
        if basis == "rho":
            return u ** (k + 1) / (k + 1)
        if u == 0:
            return 0.0
        log = math.log(u)
        return u * sum((-1) ** (k - m) * math.factorial(k) // math.factorial(m) * log**m for m in range(k + 1))

    for i in range(order - 1, 9):
        past = rho[i - torch.arange(order)]
        phi = past if basis == "rho" else past.log()
        for k in range(order):
            exact = moment(k, rho[i + 1].item()) - moment(k, rho[i].item())
            assert (coefficients[i] * phi**k).sum().item() == pytest.approx(exact, abs=1e-14 * 4**k)


def test_coefficients_of_an_even_grid_are_the_textbook_ones():
    rho = torch.arange(9, -1, -1, dtype=F64)
    for order in (1, 2, 3, 4):
        # Adams-Bashforth 1, 3/2 -1/2, 23/12 -16/12 5/12, 55/24 ...: what iPNDM takes on every grid
        torch.testing.assert_close(
            deis_coefficients(rho, order)[order - 1 :], ipndm_coefficients(rho, order)[order - 1 :], rtol=0, atol=1e-13
        )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("warmup", ["low_order", "heun", "kutta"])
def test_a_constant_prediction_is_integrated_exactly(algorithm, order, warmup):
    """Whatever the method: v(rho') = v + (rho' - rho) eps, here to 0 with the last prediction."""
    calls = plan(algorithm, order=order, warmup=warmup, lower_order_final=True, denoise=True)
    eps, v = torch.tensor([0.7, -1.3], dtype=F64), torch.tensor([0.2, 2.0], dtype=F64)
    torch.testing.assert_close(run(calls, lambda *_: eps, v), v - 1.6 * eps, rtol=0, atol=1e-14)
    start = calls[0].rho
    for call in calls:
        start = call.rho if call.stage == 0 else start
        assert sum(call.coefficients) == pytest.approx(call.rho_next - start, abs=1e-14)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_a_polynomial_prediction_is_exact_once_the_history_is_full(degree):
    """Also behind each start of several stages, whose inner predictions must not be taken for history."""
    cases = [("rho_ab", "low_order"), ("rho_ab", "heun"), ("rho_ab", "kutta"), ("t_ab", "kutta"), ("ipndm", "kutta")]
    for algorithm, warmup in cases:
        rho = torch.linspace(2.0, 0.5, 10, dtype=F64) if algorithm == "ipndm" else RHO

        def prediction(v, level, algorithm=algorithm):
            return torch.tensor([(gbm_time(level) if algorithm == "t_ab" else level) ** degree], dtype=F64)

        calls = plan(algorithm, rho, warmup=warmup)
        v = torch.zeros(1, dtype=F64)
        seen = [run(calls[: k + 1], prediction, v).item() for k in range(len(calls))]
        full = [k for k, call in enumerate(calls) if call.stage == 0][3:]
        for before, now in zip(full, full[1:], strict=False):
            low, high = calls[now].rho_next, calls[now].rho
            power = 2 * degree if algorithm == "t_ab" else degree
            scale = SIGMA ** (-2 * degree) if algorithm == "t_ab" else 1.0
            exact = scale * (low ** (power + 1) - high ** (power + 1)) / (power + 1)
            assert seen[now] - seen[before] == pytest.approx(exact, abs=1e-14 * 4**degree), (algorithm, warmup)


@pytest.mark.parametrize("name", TABLEAUS)
def test_tableaus_satisfy_the_order_conditions(name):
    nodes, matrix, weights, order = TABLEAUS[name]
    stages = len(weights)
    b, c = torch.tensor(weights, dtype=F64), torch.tensor(nodes, dtype=F64)
    a = torch.zeros(stages, stages, dtype=F64)
    for i, row in enumerate(matrix):
        a[i + 1, : i + 1] = torch.tensor(row, dtype=F64)
    torch.testing.assert_close(a.sum(dim=1), c, rtol=0, atol=1e-15)
    conditions = {1: [(b.sum(), 1)], 2: [(b @ c, 1 / 2)], 3: [(b @ c**2, 1 / 3), (b @ a @ c, 1 / 6)]}
    conditions[4] = [(b @ c**3, 1 / 4), (b @ (c * (a @ c)), 1 / 8), (b @ a @ c**2, 1 / 12), (b @ a @ a @ c, 1 / 24)]
    for p, equations in conditions.items():
        holds = all(abs(float(left) - right) < 1e-15 for left, right in equations)
        assert holds == (p <= order), f"conditions of order {p}"


def test_heun_is_the_step_of_edm():
    """Algorithm 1 of arXiv:2206.00364 without noise: d = eps; Euler; then the mean of both slopes."""
    toy = GaussianMixture()
    x = torch.linspace(-3, 3, 50, dtype=F64)
    ours = run(network_calls(RHO, "rk_2heun"), toy.epsilon, x)
    for now, after in zip(RHO.tolist(), RHO[1:].tolist(), strict=False):
        d = (x - toy.denoised(x, now)) / now
        euler = x + (after - now) * d
        x = x + (after - now) * (d + (euler - toy.denoised(euler, after)) / after) / 2
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-14)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gaussian_data_has_a_closed_form(algorithm):
    """z(rho) = b + (z_T - b) sqrt((c^2 + rho^2) / (c^2 + rho_T^2)): every method converges to it."""
    b, c = 0.3, 0.5
    toy = GaussianMixture([1.0], [b], [c])
    z = torch.linspace(-2, 3, 20, dtype=F64)
    exact = b + (z - b) * math.sqrt((c**2 + 0.025**2) / (c**2 + 1.6**2))
    errors = [
        (run(plan(algorithm, power_grid(1.6, 0.025, n), warmup="kutta"), toy.epsilon, z) - exact).abs().max()
        for n in (40, 80)
    ]
    order = TABLEAUS[algorithm[3:]].order if algorithm.startswith("rk_") else 2  # iPNDM is first order on other grids
    assert errors[1] < {1: 3e-2, 2: 1e-3, 3: 2e-5, 4: 2e-7}[order]
    assert errors[1] < errors[0] * 0.6


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_calls_are_counted(algorithm):
    stages = len(TABLEAUS[algorithm[3:]].weights) if algorithm.startswith("rk_") else 1
    calls = plan(algorithm)
    assert len(calls) == 9 * stages
    assert [call.stage for call in calls] == list(range(stages)) * 9
    extra = {"low_order": 0, "heun": 1, "kutta": 4} if algorithm in MULTISTEP else dict.fromkeys(("heun", "kutta"), 0)
    for warmup, more in extra.items():
        assert len(plan(algorithm, warmup=warmup)) == len(calls) + more


def test_the_last_steps_are_of_lower_order():
    def used(calls):
        return [sum(c != 0 for c in call.coefficients) for call in calls]

    assert used(plan("rho_ab")) == [1, 2, 3, 4, 4, 4, 4, 4, 4]
    assert used(plan("rho_ab", lower_order_final=True)) == [1, 2, 3, 4, 4, 4, 3, 2, 1]
    assert used(plan("rho_ab", warmup="heun")) == [1, 2, 2, 3, 4, 4, 4, 4, 4, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": 0}, "order must be in"),
        ({"order": 5}, "order must be in"),
        ({"order": [1, 3, 1]}, "order must be at most 2 in step 1"),
        ({"order": [1]}, "one for each of the 3 steps"),
        ({"basis": "logt"}, "basis must be one of"),
        ({"basis": "t"}, "needs time"),
        ({"basis": "t", "time": lambda rho: -rho}, "later times"),
        ({"rho": torch.tensor([1.0, 2.0])}, "falling"),
        ({"rho": torch.tensor([1.0, -0.1])}, "not negative"),
        ({"rho": torch.tensor([1.0, math.nan])}, "finite"),
        ({"rho": torch.tensor([1.0])}, "at least two"),
    ],
)
def test_wrong_arguments_of_the_coefficients(arguments, message):
    with pytest.raises(ValueError, match=message):
        deis_coefficients(**({"rho": torch.tensor([3.0, 2.0, 1.0, 0.5]), "order": 2} | arguments))


def test_wrong_arguments_of_the_plan():
    with pytest.raises(ValueError, match="order 4 needs at least 4 steps, got 3"):
        plan("rho_ab", RHO[:4])
    with pytest.raises(ValueError, match="Did you mean 'rho_ab'"):
        plan("rhoab")
    with pytest.raises(ValueError, match="warmup"):
        plan("rho_ab", warmup="euler")
    assert len(plan("rk_4rk", RHO[:2])) == 4  # one step of a one-step method has its full order
