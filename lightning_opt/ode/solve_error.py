from .solve_record import SolveRecord


class SolveError(RuntimeError):
    """A differential equation could not be solved; the message says why, where, and what may help."""

    @classmethod
    def of(cls, cause: Exception, record: SolveRecord, max_steps: int) -> "SolveError":
        """What another library's error means."""
        text = str(cause)
        if "max_num_steps" in text:
            return cls.too_many(record, max_steps)
        if "underflow" in text:
            return cls.too_small(record)
        if "non-finite" in text:
            return cls.not_finite(record)
        return cls(text)

    @classmethod
    def too_many(cls, record: SolveRecord, max_steps: int) -> "SolveError":
        """More steps than allowed."""
        return cls(
            f"the solve from {record.t0} to {record.t1} took {max_steps} steps and reached {_reached(record)}: raise"
            " max_steps or the tolerances, or regularize the dynamics"
        )

    @classmethod
    def too_small(cls, record: SolveRecord) -> "SolveError":
        """A step below the precision of time."""
        return cls(
            f"the step became too small at {_reached(record)} of the solve from {record.t0} to {record.t1}: the"
            " dynamics are too stiff for an explicit method, or the tolerances below the precision of the state"
        )

    @classmethod
    def not_finite(cls, record: SolveRecord) -> "SolveError":
        """A state or derivative that is NaN or infinite."""
        return cls(f"the state is not finite at {_reached(record)} of the solve from {record.t0} to {record.t1}")


def _reached(record: SolveRecord) -> str:
    return f"t = {record.t[-1] + record.dt[-1]:.6g}" if record.t else f"t = {record.t0:.6g}"
