"""``lightning-opt evolve``: search for short programs that approximate a function."""

import argparse
import sys
from pathlib import Path

from lightning_opt.registry import register_command
from lightning_opt.solvers.autonumerics import ParetoFront, Problem, evolve
from lightning_opt.solvers.autonumerics.baselines import Baseline, baselines
from lightning_opt.solvers.autonumerics.picture import draw

from .errors import UserError, sentence


@register_command("evolve", summary="search for short programs that approximate a function")
def evolve_command(arguments: list[str]) -> int:
    """Run ``lightning-opt evolve``.

    Args:
        arguments: The words after ``evolve``.

    Returns:
        The exit status: 130 if Ctrl-C ended the search; what was found by then is written.

    Raises:
        UserError: If an argument is out of its range, or files of another search would be overwritten.
    """
    options = _parser().parse_args(arguments)
    state = options.out.with_suffix(".state.npz")
    if options.out.is_dir() or options.out.suffix in (".png", ".npz"):
        raise UserError(
            f"--out={options.out}: must be a file for the front, such as front.json; the picture and the"
            " state go beside it."
        )
    if options.force:
        state.unlink(missing_ok=True)
    elif options.out.exists() and not state.exists():
        raise UserError(f"{options.out} exists; --force overwrites it.")
    domain = tuple(options.domain) if options.domain else None
    budget = 60.0 if options.budget is None and options.max_evals is None else options.budget
    try:
        problem = Problem(options.function, domain, options.error)
        if not options.out.parent.is_dir():
            raise UserError(f"there is no folder {options.out.parent} for --out.")
        if not options.quiet:
            print("compiling the search (the first time only)", file=sys.stderr, flush=True)
        front = evolve(
            options.function,
            domain,
            max_ops=options.max_ops,
            error=options.error,
            budget_s=budget,
            max_evals=options.max_evals,
            seed=options.seed,
            ops=options.ops,
            trainer=options.trainer,
            population=options.population,
            state=state,
            progress=not options.quiet,
        )
    except ValueError as error:
        hint = " --force starts anew." if "of another search" in str(error) else ""
        raise UserError(sentence(error) + hint) from error
    if not len(front):
        raise UserError("nothing was found before the search ended.", status=130 if front.interrupted else 1)

    front.save(options.out)
    rivals = baselines(problem, options.max_ops) if problem.error != "ulp32" else []
    picture = options.out.with_suffix(".png")
    draw(picture, [front], rivals)
    print(report(front, rivals))
    print(f"front:    {options.out}\npicture:  {picture}\nstate:    {state} (a longer search continues from it)")
    return 130 if front.interrupted else 0


def report(front: ParetoFront, rivals: list[Baseline]) -> str:
    """The front as a table, each program beside the best polynomial and the best rational of no more operations."""
    kinds = [kind for kind in ("minimax polynomial", "minimax rational") if rivals]
    lines = [f"{front.evals} programs fitted in {front.seconds:.0f} CPU seconds"]
    lines.append(f"{'ops':>4}{'largest error':>16}" + "".join(f"{kind:>20}" for kind in kinds))
    for item in front:
        line = f"{item.ops:>4}{item.max_error:>16.3g}"
        for kind in kinds:
            errors = [b.max_error for b in rivals if b.kind == kind and b.ops_as_fraction <= item.ops]
            line += f"{min(errors):>20.3g}" if errors else f"{'':>20}"
        lines.append(line)
    best = front[-1]
    return "\n".join([*lines, "", best.to_python()])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lightning-opt evolve",
        allow_abbrev=False,
        description="Search for short programs that approximate a function (AutoNumerics-Zero, arXiv:2312.08472). Run"
        " again with a larger --budget or --max-evals, it continues; killed, too.",
    )
    parser.add_argument("--function", default="exp2", help="a name, an expression of x such as 'sin(x)/x', module:name")
    parser.add_argument("--domain", nargs=2, type=float, metavar=("LOW", "HIGH"), help="default: the function's usual")
    parser.add_argument("--max-ops", "--max_ops", type=int, default=8, help="the most operations; default: 8")
    parser.add_argument("--error", choices=["relative", "absolute", "ulp32"], help="default: the function's usual")
    parser.add_argument("--budget", type=float, help="CPU seconds in all; default: 60, or none with --max-evals")
    parser.add_argument("--max-evals", "--max_evals", type=int, help="programs to fit: makes the result reproducible")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ops", default="+-*/", help="of + - * / fma sqrt, for example '+-* fma'; default: +-*/")
    parser.add_argument("--trainer", choices=["lm", "cma"], default="lm", help="cma is the paper's, and slow")
    parser.add_argument("--population", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("front.json"), help="default: front.json, and front.png")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--force", action="store_true", help="overwrite, and do not continue from an earlier search")
    return parser
