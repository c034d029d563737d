"""``lightning-opt verify-exp`` on a part of all numbers."""

import re

import pytest
import torch

from lightning_opt.cli import main, verify_exp
from lightning_opt.cli.verify_exp import _CHUNK
from lightning_opt.cpu_kernels.exp_errors import ExpErrors


def test_reports_each_function_and_implementation(capsys):
    words = ["--stride", "100003", "--implementation", "poly", "native", "--device", "cpu", "--threads", "2"]
    assert main(["verify-exp", *words]) == 0
    output = capsys.readouterr()
    rows = re.findall(r"^cpu (poly|native) (exp2|exp) +(\d\.\d{4}) +\S+ +0 +42,949$", output.out, re.MULTILINE)
    assert [row[:2] for row in rows] == [(i, f) for i in ("poly", "native") for f in ("exp2", "exp")]
    assert all(0.5 < float(row[2]) < 0.89 for row in rows)
    assert "cpu poly exp2: 100%" in output.err


def test_every_number_is_judged_once(monkeypatch):
    """In chunks, all 2^32 of them: the judge is replaced by one that counts."""
    seen = []

    def judge(function: str, first: int, count: int, *, stride: int, values: None) -> ExpErrors:
        seen.append((first, count))
        return ExpErrors(count, 0.5, float(first), first == 0)

    monkeypatch.setattr("lightning_opt.cpu_kernels.exp_errors.exp_errors", judge)
    errors = verify_exp.verify_exp("exp", threads=2)
    assert errors[:2] == (2**32, 0.5)
    assert errors.at_least_one == 1
    assert sorted(seen) == [(first, _CHUNK) for first in range(0, 2**32, _CHUNK)]
    assert verify_exp.verify_exp("exp", stride=3).inputs == 1_431_655_766


def test_a_polynomial_beyond_a_unit_fails(monkeypatch, capsys):
    monkeypatch.setattr("lightning_opt.cpu_kernels.exp_errors.exp_errors", lambda *_, **__: ExpErrors(1, 1.5, 2.0, 1))
    assert main(["verify-exp", "--stride", "100003", "--function", "exp"]) == 1
    assert "1.5000" in capsys.readouterr().out


def test_torch_is_judged_on_the_numbers_that_were_asked_for():
    """Its evaluation covers both signs: the largest error is that of torch.exp, and far from that of other inputs."""
    values = verify_exp._values("exp", "native", "cpu")
    for first in (0x3F800000, 0xBF800000):  # 1 and -1
        [one] = values(first, 1, 1).tolist()
        assert one == torch.tensor(1.0 if first < 2**31 else -1.0).exp().item()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--stride", "0"], "--stride and --threads must be 1 or more, got 0"), (["--threads", "0"], "--threads must be")],
)
def test_wrong_options_are_refused(words, message, capsys):
    assert main(["verify-exp", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_device_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["verify-exp", "--device", "cuda"]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err
