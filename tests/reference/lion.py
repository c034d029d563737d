"""Lion-K (arXiv:2310.05898): the step with explicit decay, the continuous dynamics, and its Lyapunov function."""

import numpy as np


def lion_k(w, g, memory, t, *, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, subgradient=np.sign):
    b1, b2 = betas
    m = memory.get("m", np.zeros_like(w))
    c = b1 * m + (1 - b1) * g
    memory["m"] = b2 * m + (1 - b2) * g
    return w * (1 - lr * weight_decay) - lr * subgradient(c)


def velocity(x, m, gradient, subgradient, *, alpha, gamma, decay, lead):
    """The ODE, in the paper's convention (m is minus the average of the gradients); ``lead`` is its eps."""
    m_dot = -alpha * gradient(x) - gamma * m
    return subgradient(m + lead * m_dot) - decay * x, m_dot


def runge_kutta(x, m, velocity, h):
    """One step of the classical fourth-order method."""
    k1 = velocity(x, m)
    k2 = velocity(x + h / 2 * k1[0], m + h / 2 * k1[1])
    k3 = velocity(x + h / 2 * k2[0], m + h / 2 * k2[1])
    k4 = velocity(x + h * k3[0], m + h * k3[1])
    return tuple(z + h / 6 * (a + 2 * b + 2 * c + d) for z, a, b, c, d in zip((x, m), k1, k2, k3, k4, strict=True))


def lyapunov(x, m, f, value, conjugate, *, alpha, gamma, decay, lead):
    """H(x, m); non-increasing along the ODE where lead * gamma <= 1 and decay * x is in the domain of K*."""
    c = (1 - lead * gamma) / (1 + lead * decay)
    u = decay * x
    return alpha * f(x) + gamma / decay * conjugate(u) + c * (conjugate(u) + value(m) - decay * np.sum(m * x))
