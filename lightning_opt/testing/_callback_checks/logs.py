"""What is logged, and evaluation without training."""

import tempfile
from pathlib import Path

from torch.utils.data import DataLoader, TensorDataset

from ..contract import NotApplicable, require
from .problem import Problem, data
from .subject import Subject, baseline, check, make_trainer, quiet, require_equal


@check
def logs_under_its_prefix(subject: Subject) -> None:
    """Every name that it adds to the logs begins with its registered prefix."""
    new = {name for name, _ in subject.outcome.rows} - {name for name, _ in baseline(**subject.setting).rows}
    if not new:
        raise NotApplicable(f"{subject.cls.__name__} logs nothing")
    prefix = subject.entry.log_prefix if subject.entry else ""
    require(bool(prefix), f"it logs {', '.join(sorted(new))} and has no registered log_prefix")
    wrong = sorted(name for name in new if not name.startswith(f"{prefix}/"))
    require(not wrong, f"not under {prefix}/: {', '.join(wrong)}")


@check
def evaluates_alone(subject: Subject) -> None:
    """``validate``, ``test`` and ``predict`` work without a fit, change no parameter and give the same results."""
    results = []
    for callbacks in ((), (subject.build(),)):
        module = Problem()
        loader = DataLoader(TensorDataset(*data()), 16)
        with tempfile.TemporaryDirectory() as folder, quiet():
            trainer = make_trainer(Path(folder), callbacks, logger=False)
            validated = trainer.validate(module, loader, verbose=False)
            tested = trainer.test(module, loader, verbose=False)
            predicted = trainer.predict(module, loader)
        results.append({"validate": list(validated), "test": list(tested), "predict": list(predicted or [])})
        results[-1]["parameters"] = [value.clone() for value in module.state_dict().values()]
    require_equal(results[1], results[0], "with the callback against without")
