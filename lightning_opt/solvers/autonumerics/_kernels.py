"""The compiled evaluator of programs: values, gradients by reverse differentiation, least squares on them.

A table of values has a row for x, one for each coefficient, then one for each step; ``code`` is ``Program.encoded()``.
"""

import numba
import numpy as np

_OPTIONS = {"cache": True, "error_model": "numpy"}  # numpy: division by zero gives infinity
ADD, SUB, MUL, DIV, FMA, SQRT = range(6)  # the order of graph.ARITY


@numba.njit(**_OPTIONS)
def forward(code, coefficients, table):
    """Fill a table ``[1 + coefficients + steps, points]``, whose first row is x; its last row is the output."""
    for k in range(coefficients.size):
        table[1 + k, :] = coefficients[k]
    points = table.shape[1]
    for s in range(code.shape[0]):
        op = code[s, 0]
        a, b, out = table[code[s, 1]], table[code[s, 2]], table[code[s, 4]]
        if op == ADD:
            for i in range(points):
                out[i] = a[i] + b[i]
        elif op == SUB:
            for i in range(points):
                out[i] = a[i] - b[i]
        elif op == MUL:
            for i in range(points):
                out[i] = a[i] * b[i]
        elif op == DIV:
            for i in range(points):
                out[i] = a[i] / b[i]
        elif op == FMA:
            c = table[code[s, 3]]
            for i in range(points):
                out[i] = np.float64(a[i]) * np.float64(b[i]) + np.float64(c[i])  # rounded once in float32
        else:
            for i in range(points):
                out[i] = np.sqrt(a[i])


@numba.njit(**_OPTIONS)
def backward(code, table, adjoint):
    """Fill ``adjoint``, a table of the same shape, with the derivative of the output by each row."""
    adjoint[:] = 0.0
    adjoint[-1] = 1.0
    points = table.shape[1]
    for s in range(code.shape[0] - 1, -1, -1):
        op = code[s, 0]
        ia, ib = code[s, 1], code[s, 2]
        a, b, out = table[ia], table[ib], table[code[s, 4]]
        da, db, d = adjoint[ia], adjoint[ib], adjoint[code[s, 4]]
        if op == ADD:
            for i in range(points):
                da[i] += d[i]
            for i in range(points):
                db[i] += d[i]
        elif op == SUB:
            for i in range(points):
                da[i] += d[i]
            for i in range(points):
                db[i] -= d[i]
        elif op in (MUL, FMA):
            for i in range(points):
                da[i] += d[i] * b[i]
            for i in range(points):
                db[i] += d[i] * a[i]
            if op == FMA:
                dc = adjoint[code[s, 3]]
                for i in range(points):
                    dc[i] += d[i]
        elif op == DIV:
            for i in range(points):
                q = d[i] / b[i]
                da[i] += q
                db[i] -= q * out[i]
        else:
            for i in range(points):
                da[i] += 0.5 * d[i] / out[i]


@numba.njit(**_OPTIONS)
def damped_step(rows, right, damping, work, step):
    """Solve min ``|right - sum_k step_k rows_k|^2 + damping |D step|^2``, D the norms of the rows, by Gram and Schmidt.

    Orthogonalization keeps the digits that normal equations lose: coefficients of good programs are nearly dependent.

    Args:
        rows: ``[coefficients, points]``.
        right: ``[points]``.
        damping: Of Levenberg and Marquardt.
        work: ``[coefficients + 1, points + coefficients]``, overwritten.
        step: ``[coefficients]``, the result.

    Returns:
        Whether the step is finite.
    """
    count, points = rows.shape
    triangle = np.zeros((count, count + 1))
    work[:, points:] = 0.0
    work[count, :points] = right
    for k in range(count):
        norm = 0.0
        for i in range(points):
            work[k, i] = rows[k, i]
            norm += rows[k, i] * rows[k, i]
        work[k, points + k] = np.sqrt(damping * norm) + 1e-300
    length = points + count
    for k in range(count):
        v = work[k]
        norm = 0.0
        for i in range(length):
            norm += v[i] * v[i]
        norm = np.sqrt(norm)
        if not (norm > 0.0 and norm < np.inf):
            return False
        triangle[k, k] = norm
        inverse = 1.0 / norm
        for i in range(length):
            v[i] *= inverse
        for j in range(k + 1, count + 1):
            w = work[j]
            dot = 0.0
            for i in range(length):
                dot += v[i] * w[i]
            triangle[k, j] = dot
            for i in range(length):
                w[i] -= dot * v[i]
    for k in range(count - 1, -1, -1):
        total = triangle[k, count]
        for j in range(k + 1, count):
            total -= triangle[k, j] * step[j]
        step[k] = total / triangle[k, k]
        if not np.isfinite(step[k]):
            return False
    return True


@numba.njit(**_OPTIONS)
def residuals(code, coefficients, table, y, scale, out):
    """``(f(x) - y) * scale`` at every point; returns the largest magnitude, infinite if one is not finite."""
    forward(code, coefficients, table)
    last = table[-1]
    largest = 0.0
    good = True
    for i in range(y.size):
        out[i] = (last[i] - y[i]) * scale[i]
        magnitude = abs(out[i])
        good &= magnitude < np.inf  # false for NaN
        largest = max(largest, magnitude)
    return largest if good else np.inf


@numba.njit(**_OPTIONS)
def levenberg_marquardt(code, coefficients, x, y, scale, weights, steps, tolerance, state):
    """Minimize the weighted sum of squared residuals from one start, in place.

    Args:
        code: The program.
        coefficients: Start, overwritten by the best found.
        x: Points.
        y: Wanted values there.
        scale: What residuals are multiplied with.
        weights: Of the squared residuals.
        steps: Evaluations of the gradient at most.
        tolerance: Stop when three steps in a row gain less than this share.
        state: ``[damping]``, read and overwritten.

    Returns:
        The weighted sum of squares, and the largest residual.
    """
    count, points = coefficients.size, x.size
    table = np.empty((1 + count + code.shape[0], points))
    trial_table = np.empty_like(table)
    adjoint = np.empty_like(table)
    table[0] = x
    trial_table[0] = x
    rows = np.empty((count, points))
    right = np.empty(points)
    correction = np.empty(points)
    work = np.empty((count + 1, points + count))
    step = np.empty(count)
    trial = np.empty(count)
    r = np.empty(points)
    trial_r = np.empty(points)
    largest = residuals(code, coefficients, table, y, scale, r)
    if largest == np.inf:
        return np.inf, np.inf
    total = 0.0
    for i in range(points):
        total += weights[i] * r[i] * r[i]
    damping = state[0]
    small = 0
    for iteration in range(steps):
        backward(code, table, adjoint)
        for i in range(points):
            right[i] = -np.sqrt(weights[i]) * r[i]
        for k in range(count):
            for i in range(points):
                rows[k, i] = adjoint[1 + k, i] * scale[i] * np.sqrt(weights[i])
        accepted = False
        for attempt in range(9):
            bold = attempt == 0  # once without damping: where a valley is flat, only that gets along it
            if bold and iteration < 3:
                continue
            trial[:] = coefficients
            for i in range(points):
                correction[i] = right[i]
            own = 1e-24 if bold else damping
            for _ in range(4):  # the step, then corrections of it, since valleys of good programs are narrow and bent
                if not damped_step(rows, correction, own, work, step):
                    break
                own = (1e-7 if iteration % 2 else 1e-12) if bold else max(damping, min(1e-6, np.sqrt(damping)))
                for k in range(count):
                    trial[k] += step[k]
                trial_largest = residuals(code, trial, trial_table, y, scale, trial_r)
                if trial_largest == np.inf:
                    break
                trial_total = 0.0
                for i in range(points):
                    correction[i] = -np.sqrt(weights[i]) * trial_r[i]
                    trial_total += correction[i] * correction[i]
                if trial_total < total:
                    accepted = True
                    break
            if accepted:
                break
            if not bold:
                damping *= 8.0
        if not accepted:
            break
        gain = 1.0 - trial_total / total
        coefficients[:] = trial
        table, trial_table = trial_table, table
        r, trial_r = trial_r, r
        total, largest = trial_total, trial_largest
        if not bold:
            damping = max(damping * (0.02 if gain > 0.5 else 0.15), 1e-24)
        small = small + 1 if gain < tolerance else 0
        if small == 3:
            break
    state[0] = damping
    return total, largest


@numba.njit(**_OPTIONS)
def multistart(code, starts, x, y, scale, short, long, keep, limit):
    """Least squares from many starts: a few steps from each, all steps from the best.

    Args:
        code: The program.
        starts: ``[starts, coefficients]``, overwritten.
        x: Points.
        y: Wanted values there.
        scale: What residuals are multiplied with.
        short: Steps from each start.
        long: Further steps from the ``keep`` best.
        keep: How many are continued.
        limit: A start whose largest residual is this times above that of the best is not continued.

    Returns:
        The coefficients with the smallest largest residual, and that residual.
    """
    count = starts.shape[0]
    points = x.size
    weights = np.full(points, 1.0 / points)
    totals = np.empty(count)
    states = np.empty((count, 1))
    for s in range(count):
        states[s, 0] = 1e-3
        totals[s], _ = levenberg_marquardt(code, starts[s], x, y, scale, weights, short, 1e-2, states[s])
    order = np.argsort(totals)
    best, best_error = starts[order[0]].copy(), np.inf
    for rank in range(min(keep, count)):
        s = order[rank]
        if not totals[s] <= limit * limit * totals[order[0]] or totals[s] == np.inf:
            continue
        _, error = levenberg_marquardt(code, starts[s], x, y, scale, weights, long, 1e-3, states[s])
        if error < best_error:
            best, best_error = starts[s].copy(), error
    return best, best_error


@numba.njit(**_OPTIONS)
def lawson(code, coefficients, x, y, scale, rounds):
    """From least squares to least maximum: reweight by the residuals, fit again, ``rounds`` times (Lawson's method).

    Returns:
        The coefficients with the smallest largest residual seen, and that residual.
    """
    points = x.size
    table = np.empty((1 + coefficients.size + code.shape[0], points))
    table[0] = x
    r = np.empty(points)
    weights = np.full(points, 1.0 / points)
    current = coefficients.copy()
    best, best_error = coefficients.copy(), residuals(code, coefficients, table, y, scale, r)
    state = np.array([1e-6])
    for _ in range(rounds):
        largest = 0.0
        for i in range(points):
            largest = max(largest, abs(r[i]))
        if not (largest > 0.0 and largest < np.inf):
            break
        total = 0.0
        for i in range(points):
            weights[i] *= abs(r[i]) / largest
            total += weights[i]
        if not total > 0.0:
            break
        for i in range(points):
            weights[i] = weights[i] / total + 1e-18
        levenberg_marquardt(code, current, x, y, scale, weights, 2, 1e-9, state)
        error = residuals(code, current, table, y, scale, r)
        if error < best_error:
            best, best_error = current.copy(), error
    return best, best_error


@numba.njit(**_OPTIONS)
def values(code, coefficients, x):
    """The program's values in the dtype of x and the coefficients."""
    table = np.empty((1 + coefficients.size + code.shape[0], x.size), dtype=x.dtype)
    table[0] = x
    forward(code, coefficients, table)
    return table[-1].copy()


@numba.njit(**_OPTIONS)
def largest_errors(code, candidates, x, y, scale):
    """The largest residual of each row of coefficients."""
    table = np.empty((1 + candidates.shape[1] + code.shape[0], x.size))
    table[0] = x
    r = np.empty(x.size)
    result = np.empty(candidates.shape[0])
    for k in range(candidates.shape[0]):
        result[k] = residuals(code, candidates[k], table, y, scale, r)
    return result
