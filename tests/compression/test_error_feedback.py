"""Error feedback on several ranks in one process, beside the papers' recursions and closed forms."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_opt.compression import (
    CompressionState,
    Compressor,
    Identity,
    QuantizeInt8,
    RandK,
    ScaledSign,
    TopK,
    ef21_stepsize,
    xi,
)
from lightning_opt.compression.state import mean_local_state
from tests.compression.label_sorted_clients import CLIENTS, LabelSortedClients, average
from tests.reference import error_feedback as reference

pytestmark = pytest.mark.usefixtures("one_thread")


class Quadratics:
    """f_i(x) = |A_i x - b_i|^2 / 2; the smoothness of the last rank is about a hundred times that of the others."""

    def __init__(self, n: int = 4, d: int = 20) -> None:
        generator = torch.Generator().manual_seed(1)
        scales = torch.ones(n, dtype=torch.float64)
        scales[-1] = 10
        self.a = torch.randn(n, d, d, generator=generator, dtype=torch.float64) / d**0.5 * scales[:, None, None]
        self.b = torch.randn(n, d, generator=generator, dtype=torch.float64)
        self.n, self.d = n, d
        self.smoothness = [float(torch.linalg.matrix_norm(a, 2) ** 2) for a in self.a]
        self.mean_smoothness = float(torch.linalg.matrix_norm((self.a.mT @ self.a).mean(0), 2))

    def gradient(self, i: int, x: np.ndarray) -> np.ndarray:
        a, b = self.a[i].numpy(), self.b[i].numpy()
        return a.T @ (a @ x - b)

    def gradients(self, x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(self.gradient(i, x.numpy())) for i in range(self.n)]


def ranks(algorithm: str, compressor: Compressor, n: int, **options) -> list[CompressionState]:
    options = {"min_numel": 1, **options}
    return [CompressionState(algorithm, compressor, rank=i, world_size=n, **options) for i in range(n)]


def descend(states, gradients, x: Tensor, lr: float, steps: int) -> Tensor:
    """The iterates."""
    path = [x]
    for _ in range(steps):
        x = x - lr * average(states, gradients(x))
        path.append(x)
    return torch.stack(path)


PROBLEM = Quadratics()
START = torch.ones(20, dtype=torch.float64)
LR = 0.1 / PROBLEM.mean_smoothness


@pytest.mark.parametrize(
    ("algorithm", "options", "naive"),
    [
        ("ef14", {}, lambda *a: reference.ef14(*a)),
        ("ef21", {}, lambda *a: reference.ef21(*a)),
        ("ef21", {"momentum": 0.3}, lambda *a: reference.ef21_sgdm(*a, 0.3)),
        ("econtrol", {}, lambda *a: reference.econtrol(*a, 2 / 20)),
        ("econtrol", {"eta": 0.03}, lambda *a: reference.econtrol(*a, 0.03)),
    ],
    ids=["ef14", "ef21", "ef21-sgdm", "econtrol", "econtrol-eta"],
)
def test_iterates_are_those_of_the_papers(algorithm, options, naive):
    """In float64, over 50 steps that contract: rounding stays near 1e-15."""
    steps = 50
    path = descend(ranks(algorithm, TopK(k=2), 4, **options), PROBLEM.gradients, START, LR, steps)
    expected = naive(PROBLEM.gradient, START.numpy(), 4, 2, LR, steps)
    np.testing.assert_allclose(path.numpy(), expected, rtol=0, atol=1e-12)


def test_ef21_w_is_ef21_for_topk():
    """With ranks 100 : 1; 1e-12 of steps that stay below 10."""
    weights = [s / sum(PROBLEM.smoothness) for s in PROBLEM.smoothness]
    lr = ef21_stepsize(PROBLEM.mean_smoothness, PROBLEM.smoothness, 2 / 20)
    plain = descend(ranks("ef21", TopK(k=2), 4), PROBLEM.gradients, START, lr, 1000)
    weighted = descend(ranks("ef21", TopK(k=2), 4, weights=weights), PROBLEM.gradients, START, lr, 1000)
    np.testing.assert_allclose(weighted, plain, rtol=0, atol=1e-12)
    expected = reference.ef21_w(PROBLEM.gradient, START.numpy(), weights, 2, lr, 1000)
    np.testing.assert_allclose(weighted, expected, rtol=0, atol=1e-11)


def test_ef21_w_differs_where_the_compressor_is_not_homogeneous():
    weights = [s / sum(PROBLEM.smoothness) for s in PROBLEM.smoothness]
    paths = [
        descend(ranks("ef21", QuantizeInt8(step=0.1), 4, weights=w), PROBLEM.gradients, START, LR, 10)
        for w in (None, weights)
    ]
    assert (paths[0] - paths[1]).abs().max() > 1e-6


def test_the_arithmetic_mean_allows_larger_steps_which_pay():
    """The published effect, small: ranks 100 : 1, Top-2 of 20, 1000 steps with the largest step of either theory."""
    L, L_i = PROBLEM.mean_smoothness, PROBLEM.smoothness
    norms, rates = [], []
    for analysis in ("am", "qm"):
        lr = ef21_stepsize(L, L_i, 2 / 20, analysis)
        x = descend(ranks("ef21", TopK(k=2), 4), PROBLEM.gradients, START, lr, 1000)[-1]
        norms.append(float(torch.stack(PROBLEM.gradients(x)).mean(0).norm()))
        rates.append(lr)
    assert rates[0] / rates[1] >= 1.5
    assert norms[0] < 0.9 * norms[1]


def test_naive_top_1_diverges_by_its_closed_form_and_ef21_converges():
    """f_i(x) = (a_i x)^2 + |x|^2 / 4: on the diagonal, Top-1 takes the one coordinate with the wrong sign."""
    a = torch.tensor([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]], dtype=torch.float64)
    gradients = lambda x: [2 * (r @ x) * r + x / 2 for r in a]  # noqa: E731
    start = torch.ones(3, dtype=torch.float64)
    path = descend(ranks("naive", TopK(k=1), 3), gradients, start, 0.05, 30)
    growth = (1 + 11 * 0.05 / 6) ** torch.arange(31, dtype=torch.float64)
    torch.testing.assert_close(path, growth[:, None] * start, rtol=1e-13, atol=0)
    smoothness = float(2 * a[0] @ a[0] + 0.5)
    mean = float(torch.linalg.eigvalsh(2 * (a.T @ a) / 3 + torch.eye(3) / 2)[-1])
    lr = ef21_stepsize(mean, [smoothness] * 3, 1 / 3)
    path = descend(ranks("ef21", TopK(k=1), 3), gradients, start, lr, 400)
    assert path[-1].norm() < 0.12 < 1.7 < path[0].norm()  # 0.112 by the sheet


def test_econtrol_with_eta_0_is_ef21_bit_for_bit():
    for init in ("dense", "compressed", "zeros"):
        plain = descend(ranks("ef21", TopK(k=2), 4, init=init), PROBLEM.gradients, START, LR, 100)
        controlled = descend(ranks("econtrol", TopK(k=2), 4, eta=0.0, init=init), PROBLEM.gradients, START, LR, 100)
        assert torch.equal(plain, controlled)


def test_econtrol_without_estimate_and_eta_1_is_ef14_bit_for_bit():
    """The estimates are put back to zero behind every step."""
    plain, frozen = ranks("ef14", TopK(k=2), 4), ranks("econtrol", TopK(k=2), 4, eta=1.0, init="zeros")
    x = y = START
    for _ in range(100):
        x = x - LR * average(plain, PROBLEM.gradients(x))
        y = y - LR * average(frozen, PROBLEM.gradients(y))
        for state in frozen:
            state.memory["w"].estimate.zero_()
            state.memory["w"].mean_estimate.zero_()
        assert torch.equal(x, y)


@pytest.mark.parametrize("algorithm", ["naive", "ef14", "ef21", "econtrol"])
@pytest.mark.parametrize("compressor", [Identity(), TopK(ratio=1.0)], ids=repr)
def test_nothing_is_lost_without_compression(algorithm, compressor):
    path = descend(ranks(algorithm, compressor, 4), PROBLEM.gradients, START, LR, 50)
    dense = descend(ranks("naive", Identity(), 4), PROBLEM.gradients, START, LR, 50)
    exact = [START]
    for _ in range(50):
        exact.append(exact[-1] - LR * torch.stack(PROBLEM.gradients(exact[-1])).mean(0))
    torch.testing.assert_close(dense, torch.stack(exact), rtol=0, atol=1e-13)
    torch.testing.assert_close(path, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("algorithm", ["ef21", "econtrol"])
@pytest.mark.parametrize(
    "compressor", [TopK(k=2, value_dtype="bfloat16"), RandK(k=2), ScaledSign(), QuantizeInt8(8)], ids=repr
)
@pytest.mark.parametrize("weights", [None, [0.1, 0.2, 0.3, 0.4]])
def test_the_mean_of_the_estimates_is_known_to_all(algorithm, compressor, weights):
    """And the error is the sum of what was not passed on. In float32 over 100 steps: 100 roundings of 6e-8."""
    states = ranks(algorithm, compressor, 4, weights=weights, eta=0.05 if algorithm == "econtrol" else None)
    x, passed_over = START.float(), [torch.zeros(20) for _ in range(4)]
    for t in range(100):
        gradients = [g.float() for g in PROBLEM.gradients(x.double())]
        x = x - LR * average(states, gradients)
        memories = [state.memory["w"] for state in states]
        assert all(torch.equal(m.mean_estimate, memories[0].mean_estimate) for m in memories)
        shares = weights or [0.25] * 4
        mean = sum(w * m.estimate for w, m in zip(shares, memories, strict=True))
        scale = max(float(m.estimate.abs().max()) for m in memories)
        torch.testing.assert_close(mean, memories[0].mean_estimate, rtol=0, atol=1e-5 * scale)
        if algorithm == "econtrol" and t > 0:
            for i, (memory, g, w) in enumerate(zip(memories, gradients, shares, strict=True)):
                passed_over[i] += g / (4 * w) - memory.estimate
                limit = 1e-5 * (1 + float(passed_over[i].abs().max()) + 10 * scale)
                torch.testing.assert_close(memory.error, passed_over[i], rtol=0, atol=limit)


def test_econtrol_follows_dense_descent_where_clients_differ():
    """Ten clients sorted by label, Top-7 of 650, 1800 steps at rate 1, as in the sheet of the method."""
    problem = LabelSortedClients()
    best = problem.minimum()
    gaps = {}
    for algorithm in (None, "ef14", "econtrol"):
        states = [] if algorithm is None else ranks(algorithm, TopK(k=7), CLIENTS)
        gaps[algorithm] = float(problem.loss(problem.train(states, 1800))) - best
    assert gaps["econtrol"] <= 3 * gaps[None]
    assert gaps["econtrol"] <= gaps["ef14"] / 10


def test_a_gradient_that_is_not_finite_changes_nothing():
    for algorithm in ("ef14", "ef21", "econtrol"):
        states = ranks(algorithm, TopK(k=2), 2, momentum=0.5 if algorithm == "ef21" else None)
        gradients = [torch.randn(20), torch.randn(20)]
        for _ in range(3):
            average(states, gradients)
        before = [state.local_state()["w"] for state in states]
        before = [{k: v.clone() for k, v in tensors.items()} for tensors in before]
        broken = [torch.full((20,), torch.nan), gradients[1]]
        broken = [state.average("w", g) for state, g in zip(states, broken, strict=True)]
        words = torch.stack([state.encode("w", g) for state, g in zip(states, broken, strict=True)]) * 0
        for state, g, old in zip(states, broken, before, strict=True):
            state.decode("w", g, words, torch.tensor(False))
            assert all(torch.equal(old[k], v) for k, v in state.local_state()["w"].items())


def test_state_goes_on_bit_for_bit_and_changes_its_ranks():
    options = {"eta": 0.05, "weights": [0.1, 0.2, 0.3, 0.4]}
    states = ranks("econtrol", RandK(k=2), 4, **options)
    descend(states, PROBLEM.gradients, START, LR, 10)
    shared, local = states[0].shared_state(), [state.local_state() for state in states]
    resumed = ranks("econtrol", RandK(k=2), 4, eta=0.05)
    for state, own in zip(resumed, local, strict=True):
        state.load(shared, own, [("w", START)])
    gradients = PROBLEM.gradients(START)
    expected = average(states, gradients)
    assert torch.equal(average(resumed, gradients), expected)

    shared, local = states[0].shared_state(), [state.local_state() for state in states]
    fewer = ranks("econtrol", RandK(k=2), 2, eta=0.05)
    for state in fewer:
        state.load(shared, mean_local_state(shared, local), [("w", START)])
        memory = state.memory["w"]
        assert torch.equal(memory.estimate, memory.mean_estimate)
        mean = torch.stack([own["w"]["error"] for own in local]).mean(0)
        torch.testing.assert_close(memory.error, mean, rtol=1e-14, atol=1e-14)
        assert state.weights is None
        assert state.step == 11


def test_options_may_change_on_the_way():
    """Momentum begins, and a tensor that was below min_numel is remembered from now on, as in a new run."""
    states = ranks("ef21", TopK(k=2), 2, min_numel=21)
    gradients = PROBLEM.gradients(START)[:2]
    average(states, gradients)
    resumed, fresh = (ranks("ef21", TopK(k=2), 2, momentum=0.5) for _ in range(2))
    for state, old in zip(resumed, states, strict=True):
        state.load(old.shared_state(), old.local_state(), [("w", START)])
        assert state.memory == {}
    for _ in range(3):
        assert torch.equal(average(resumed, gradients), average(fresh, gradients))
    plain = ranks("ef21", TopK(k=2), 2)
    average(plain, gradients)
    late = ranks("ef21", TopK(k=2), 2, momentum=0.5)
    for state, old in zip(late, plain, strict=True):
        state.load(old.shared_state(), old.local_state(), [("w", START)])
    average(late, [2 * g for g in gradients])
    average(late, gradients)
    torch.testing.assert_close(late[0].memory["w"].average, 1.5 * gradients[0])


def test_an_error_in_bfloat16_is_kept_in_it():
    states = ranks("ef14", TopK(k=2), 2, error_dtype="bfloat16")
    average(states, [torch.randn(20), torch.randn(20)])
    assert states[0].memory["w"].error.dtype == torch.bfloat16
    average(states, [torch.randn(20), torch.randn(20)])


def test_theory():
    assert xi(1.0) == 0
    assert xi(1 / 3) == pytest.approx(4.4495, abs=5e-5)
    alpha = 0.2
    assert xi(alpha) == pytest.approx((1 - alpha) ** 0.5 / (1 - (1 - alpha) ** 0.5))
    assert ef21_stepsize(17.166667, [34.5] * 3, 1 / 3) == pytest.approx(0.005859, abs=1e-6)
    assert ef21_stepsize(2.0, [3.0, 4.0], 0.5, "qm") == pytest.approx(1 / (2 + 12.5**0.5 * xi(0.5)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CompressionState("ef22", TopK()), "algorithm must be one of .* Did you mean 'ef21'"),
        (
            lambda: CompressionState("ef21", None),
            r"compressor must be a Compressor such as TopK\(ratio=0.01\), got None",
        ),
        (lambda: CompressionState("econtrol", TopK(), eta=1.5), r"eta must be in \[0, 1\], got 1.5"),
        (lambda: CompressionState("econtrol", TopK(), eta=-0.1), r"eta must be in \[0, 1\], got -0.1"),
        (
            lambda: CompressionState("econtrol", ScaledSign()),
            r"eta=None takes the contraction .* ScaledSign\(\) is not known .* give eta in \[0, 1\]",
        ),
        (lambda: CompressionState("econtrol", QuantizeInt8(step=0.1)), "is not known"),
        (lambda: CompressionState("ef21", TopK(), momentum=0.0), r"momentum must be in \(0, 1\], got 0.0"),
        (lambda: CompressionState("ef21", TopK(), init="none"), "init must be one of"),
        (
            lambda: CompressionState("ef21", TopK(), weights=[0.5, 0.5]),
            "weights must have one value for each of 1 ranks",
        ),
        (lambda: CompressionState("ef21", TopK(), weights=[0.5]), "weights must sum to 1, got 0.5"),
        (
            lambda: CompressionState("ef21", TopK(), weights=[1.5, -0.5], world_size=2),
            "weights must be > 0 and finite, got -0.5",
        ),
        (lambda: xi(0.0), r"alpha must be in \(0, 1\], got 0.0"),
        (lambda: ef21_stepsize(0.0, [1.0], 0.5), "L must be > 0"),
        (lambda: ef21_stepsize(1.0, [], 0.5), "L_i must have a value for each rank, got none"),
    ],
)
def test_wrong_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("algorithm", ["ef14", "ef21", "econtrol"])
def test_a_parameter_without_elements_says_nothing(algorithm):
    (state,) = ranks(algorithm, TopK(ratio=0.1), 1, min_numel=0)
    for _ in range(2):
        words = state.encode("w", torch.zeros(0))
        assert len(words) == state.nwords("w", 0) == 0
        assert state.decode("w", torch.zeros(0), words[None]).shape == (0,)


def test_the_state_of_another_algorithm_is_refused():
    states = ranks("ef21", TopK(k=2), 1)
    average(states, [torch.ones(20)])
    other = CompressionState("econtrol", TopK(k=2))
    with pytest.raises(ValueError, match="one of 'ef21', which remembers other things than 'econtrol'"):
        other.load(states[0].shared_state(), states[0].local_state(), [("w", START)])
    same = CompressionState("ef21", TopK(k=2))
    with pytest.raises(ValueError, match="the state of w has 20 elements, the parameter 5"):
        same.load(states[0].shared_state(), states[0].local_state(), [("w", torch.ones(5))])
