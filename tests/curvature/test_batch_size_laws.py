import pytest
import torch

from lightning_opt.curvature import minibatch_eigenvalue, predict_max_lr, rescale_lr


def test_rules_of_thumb():
    assert rescale_lr(0.05, 128, 512) == pytest.approx(0.2)  # the recipes of the authors' release
    assert rescale_lr(4e-4, 128, 256, "sqrt") == pytest.approx(5.66e-4, rel=1e-3)


@pytest.mark.parametrize("spike", [4.0, 2.0, 0.5])
def test_a_spike_in_a_wigner_matrix(spike):
    """The largest eigenvalue of noise plus a spike fluctuates by 1/sqrt(P), at the edge by P^(-2/3)."""
    p, s = 600, 1.0
    generator = torch.Generator().manual_seed(0)
    largest = []
    for _ in range(4):
        a = torch.randn(p, p, generator=generator, dtype=torch.float64) * s / p**0.5  # the mean over b = p samples
        noise = (a + a.T) / 2**0.5
        noise[0, 0] += spike
        largest.append(torch.linalg.eigvalsh(noise)[-1].item())
    predicted = minibatch_eigenvalue(spike, s, p, batch_size=p)
    assert predicted == {4.0: 4.25, 2.0: 2.5, 0.5: 2.0}[spike]
    # standard deviation of one about 2 / sqrt(600) = 0.08, of four 0.04; the edge lies P^(-2/3) = 0.014 lower
    assert sum(largest) / 4 == pytest.approx(predicted, abs=0.12)


def test_negative_edge_and_all_data():
    assert minibatch_eigenvalue(-4.0, 1.0, 100, 100) == -4.25
    assert minibatch_eigenvalue(-0.1, 1.0, 100, 100) == -2.0
    assert minibatch_eigenvalue(3.0, 1.0, 100, 50, dataset_size=50) == 3.0


def test_the_prediction_saturates_and_recovers_the_law():
    n, sharpness, noise = 1000, 2.0, 40.0
    sizes = [8, 32, 128]
    measured = [sharpness + noise * (1 / b - 1 / n) for b in sizes]
    for used in (2, 3):
        largest = predict_max_lr(sizes[:used], measured[:used], n)
        assert largest(n) == pytest.approx(2 / sharpness, rel=1e-12)
        assert largest(128) == pytest.approx(2 / measured[2], rel=1e-12)
        assert largest(8, momentum=0.9) == pytest.approx(3.8 / measured[0], rel=1e-12)
    assert largest(512) < rescale_lr(largest(8), 8, 512)  # the rule of thumb is an upper bound


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rescale_lr(0.1, 0, 8), "base_batch must be > 0"),
        (lambda: rescale_lr(0.1, 8, 8, "cubic"), "rule must be one of"),
        (lambda: predict_max_lr([8, 8], [1.0, 1.0]), "two or more different"),
        (lambda: predict_max_lr([8, 16], [4.0, 2.0]), "grow less than in proportion"),
        (lambda: predict_max_lr([8, 64], [4.0, 2.0], 32), r"batch_size must be in \[1, 32\], got 64"),
        (lambda: minibatch_eigenvalue(1.0, -1.0, 3, 3), "noise must be >= 0"),
    ],
)
def test_wrong_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
