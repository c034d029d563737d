"""Programs as source code."""

import keyword
import re
from collections.abc import Callable, Sequence

from .program import COEFFICIENT, Program, X

_PYTHON: dict[str, Callable[..., str]] = {
    "+": "{} + {}".format, "-": "{} - {}".format, "*": "{} * {}".format, "/": "{} / {}".format,
    "fma": "{} * {} + {}".format, "sqrt": "{} ** 0.5".format,
}  # fmt: skip
_TRITON: dict[str, Callable[..., str]] = {
    **_PYTHON, "/": "tl.div_rn({}, {})".format, "fma": "tl.fma({}, {}, {})".format, "sqrt": "tl.sqrt_rn({})".format,
}  # fmt: skip


def python_source(program: Program, coefficients: Sequence[float], name: str, summary: str) -> str:
    """A Python function of one argument: a float, a numpy array or a torch tensor.

    A float raises ``ZeroDivisionError`` where an array gives infinity on the way. ``fma`` becomes a product and a sum.

    Example:
        >>> program = Program([("*", (0, -1)), ("+", (1, -1))])
        >>> print(python_source(program, [2.0, 1.0], "line", "2 x + 1."))
        def line(x):
            \"\"\"2 x + 1.\"\"\"
            t1 = x * 2.0
            return t1 + 1.0
        <BLANKLINE>
    """
    return _source(program, coefficients, _PYTHON, f"def {function_name(name)}(x):", summary)


def triton_source(program: Program, coefficients: Sequence[float], name: str, summary: str) -> str:
    """A module with a Triton device function, for use inside other kernels, on float32 values.

    Divisions and square roots are rounded to nearest. Compiled for a GPU, Triton joins a product and a sum into one
    fma, so that last bits differ from the Python function.
    """
    head = f"import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef {function_name(name)}(x):"
    return _source(program, coefficients, _TRITON, head, summary)


def function_name(name: str) -> str:
    """A valid name for the approximation of a function.

    Example:
        >>> function_name("exp2"), function_name("1 / (1 + exp(-x))")
        ('exp2', 'f_1_1_exp_x')
    """
    word = re.sub(r"\W+", "_", name).strip("_")
    return word if word.isidentifier() and not keyword.iskeyword(word) else f"f_{word}".rstrip("_")


def _source(
    program: Program, coefficients: Sequence[float], forms: dict[str, Callable[..., str]], head: str, summary: str
) -> str:
    values = iter(coefficients)
    lines = [head, f'    """{summary}"""']
    for number, (op, operands) in enumerate(program.steps, 1):
        own = ["x" if k == X else repr(float(next(values))) if k == COEFFICIENT else f"t{k}" for k in operands]
        result = forms[op](*own)
        lines.append(f"    t{number} = {result}" if number < program.ops else f"    return {result}")
    if not program.steps:
        lines.append("    return x")
    return "\n".join(lines) + "\n"
