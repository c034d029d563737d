"""The elementwise kernels compiled for a GPU, without a GPU; run as a script, this prints what became of each case."""

import json
import re
from collections import Counter
from typing import Any

import pytest

UPDATE = {"prediction": True, "noise": True, "log_state": False, "poly": False}
NUMBERS = dict.fromkeys(["a", "b", "c"], 1.5)
STEP = dict.fromkeys(["skip", "gain", "constant", "pull", "shift", "scale"], 0.5)
NOISING = {"state": "scaled", "target": "edm", "log_input": True}
# kernel, inputs, number of outputs, coefficients (a list: one a row), flags, dtype, whether noise is drawn
CASES: dict[str, tuple[str, list[str], int, dict[str, Any], dict[str, Any], str, bool]] = {
    "update": ("multiplicative_update", ["x", "prediction"], 1, NUMBERS, UPDATE, "float32", True),
    "update poly": (
        "multiplicative_update",
        ["x", "prediction"],
        1,
        NUMBERS,
        {**UPDATE, "poly": True},
        "float32",
        True,
    ),
    "update given": ("multiplicative_update", ["x", "prediction", "noise"], 1, NUMBERS, UPDATE, "float32", False),
    "update rows": ("multiplicative_update", ["x", "prediction"], 1, {**NUMBERS, "a": []}, UPDATE, "float32", True),
    "update bfloat16": ("multiplicative_update", ["x", "prediction"], 1, NUMBERS, UPDATE, "bfloat16", True),
    "update float16": ("multiplicative_update", ["x", "prediction"], 1, NUMBERS, UPDATE, "float16", True),
    "step": ("log_step", ["y", "output"], 2, STEP, {"noise": True}, "float32", True),
    "noising": (
        *("forward_noising", ["clean"], 2),
        *({"mean_shift": 0.0, "rho": [], "log_mean": 0.0, "log_std": 1.0}, NOISING, "float32", True),
    ),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    from tests.triton_kernels.test_compile import report_of

    return report_of(__file__, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("case", CASES)
def test_memory_is_moved_four_elements_at_a_time(case, compiled):
    _, inputs, outputs, _, _, dtype, _ = CASES[case]
    width = "v4" if dtype == "float32" else "v2"
    accesses = compiled[case]["accesses"]
    assert accesses[f"ld.global.{width}.b32"] == len(inputs)
    assert accesses[f"st.global.{width}.b32"] == outputs


@pytest.mark.parametrize("case", CASES)
def test_noise_takes_no_memory_and_few_registers(case, compiled):
    """The four numbers of a counter are the four elements of a thread: nothing goes through shared memory."""
    assert compiled[case]["shared"] == 0
    assert compiled[case]["spilled"] == 0
    # 65536 registers over 12 programs of 128 threads, given in eights
    assert compiled[case]["registers"] <= 65536 // (12 * 128) // 8 * 8
    # ten rounds of two products
    assert compiled[case]["functions"].get("mul.hi.u32", 0) == (20 if CASES[case][-1] else 0)


def test_the_exponential_is_one_instruction_or_a_program(compiled):
    assert compiled["update"]["functions"]["ex2.approx.f32"] == 4
    assert "ex2.approx.f32" not in compiled["update poly"]["functions"]
    more = compiled["update poly"]["functions"]["fma.rn.f32"] - compiled["update"]["functions"]["fma.rn.f32"]
    assert more == 4 * 8  # reduction 3, program 5 (and a product), for each element


def test_one_kernel_serves_every_key_and_number(compiled):
    assert compiled["keys and numbers"] == {"kernels": 1}


def main() -> None:
    import torch
    from test_compile import Compiler, resources

    from lightning_opt.triton_kernels import _noise_map

    compiler = _noise_map.noise_map = Compiler(_noise_map.noise_map)
    report = {}
    for case, (name, inputs, outputs, numbers, flags, dtype, drawn) in CASES.items():
        x = torch.ones(20, 1024, dtype=getattr(torch, dtype))
        rows = {n: torch.ones(20) if isinstance(value, list) else value for n, value in numbers.items()}
        key = (1, 2) if drawn else None
        _noise_map.launch_map(name, dict.fromkeys(inputs, x), [x] * outputs, rows, flags=flags, key=key)
        result = compiler.results[-1]
        ptx = result.asm["ptx"]
        report[case] = {
            "accesses": Counter(re.findall(r"(?:ld|st)\.global(?:\.v\d)?\.b\d+", ptx)),
            "functions": Counter(re.findall(r"(?:ex2|fma|mul\.hi)(?:\.\w+)+", ptx)),
            "shared": result.metadata.shared,
            **resources(ptx),
        }
    compiler.results.clear()
    x = torch.ones(2048)
    for key in [(0, 0), (1, 16), (2**31, 2**32), (2**64 - 1, 2**64 - 1)]:
        for number in (0.0, 1.0, 16.0):
            numbers = dict.fromkeys("abc", number)
            _noise_map.launch_map(
                "multiplicative_update", {"x": x, "prediction": x}, [x], numbers, flags=UPDATE, key=key
            )
    report["keys and numbers"] = {"kernels": len({kernel.hash for kernel in compiler.results})}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
