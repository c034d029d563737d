"""FZooS in numpy, one formula after the other, with inverses and loops; only random numbers come from torch."""

import numpy as np
import torch


class NaiveClient:
    def __init__(self, f, x0, *, frequencies, phases, generator, length, noise, lr, steps, active, pool, radius, gamma):
        self.f, self.x, self.V, self.b = f, x0.copy(), frequencies, phases
        self.generator, self.length, self.noise, self.lr, self.steps = generator, length, noise, lr, steps
        self.active, self.pool, self.radius, self.gamma = active, pool, radius, gamma
        self.X, self.y = [], []
        self.nu = self.nu_mean = None

    def kernel(self, a, b):
        return np.exp(-np.sum((a - b) ** 2) / (2 * self.length**2))

    def slope(self, x, at):
        """Derivative of k(x, at) by x."""
        return self.kernel(x, at) * (at - x) / self.length**2

    def inverse(self):
        n = len(self.X)
        K = np.array([[self.kernel(self.X[i], self.X[j]) for j in range(n)] for i in range(n)])
        return np.linalg.inv(K + self.noise * np.eye(n))

    def gradient(self, x):
        y = np.array(self.y)
        scaled = (y - y.mean()) / y.std()
        slopes = np.array([self.slope(x, at) for at in self.X])
        return y.std() * slopes.T @ self.inverse() @ scaled

    def uncertainty(self, x, inverse):
        slopes = np.array([self.slope(x, at) for at in self.X])
        return np.trace(np.eye(len(x)) / self.length**2 - slopes.T @ inverse @ slopes)

    def query(self, x):
        self.X.append(x)
        self.y.append(self.f(x))

    def candidates(self, count, radius):
        uniform = torch.rand(count, len(self.x), generator=self.generator, dtype=torch.float64).numpy()
        return [self.x + radius * (2 * u - 1) for u in uniform]

    def explore(self, count, pool, radius):
        candidates = self.candidates(pool, radius)
        inverse = self.inverse()
        scores = [self.uncertainty(c, inverse) for c in candidates]
        for k in np.argsort(scores)[::-1][:count]:
            self.query(candidates[k])

    def features(self, x):
        return np.sqrt(2 / len(self.b)) * np.cos(self.V.T @ x + self.b)

    def feature_gradient(self, x, nu):
        return -np.sqrt(2 / len(self.b)) * self.V @ (np.sin(self.V.T @ x + self.b) * nu)

    def local_round(self):
        m, v = 0, 0
        for t in range(1, self.steps + 1):
            g = self.gradient(self.x)
            if self.nu_mean is not None:
                g = g + self.gamma / t * (
                    self.feature_gradient(self.x, self.nu_mean) - self.feature_gradient(self.x, self.nu)
                )
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            self.x = self.x - self.lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            self.query(self.x)
            if t < self.steps:
                self.explore(self.active, self.pool, self.radius)

    def fit_weights(self):
        """Ridge regression in its primal form, M x M."""
        y = np.array(self.y)
        scaled = (y - y.mean()) / y.std()
        Phi = np.array([self.features(x) for x in self.X])
        normal = Phi.T @ Phi + self.noise * np.eye(len(self.b))
        self.nu = y.std() * np.linalg.solve(normal, Phi.T @ scaled)


def naive_fzoos(fs, x0, *, rounds, init, sync_active, sync_pool, frequencies, phases, generators, **settings):
    """Returns the server's points; all queries count for every surrogate."""
    clients = [
        NaiveClient(f, x0, frequencies=frequencies, phases=phases, generator=generator, **settings)
        for f, generator in zip(fs, generators, strict=True)
    ]
    for client in clients:
        client.query(client.x)
        for candidate in client.candidates(init, client.radius):
            client.query(candidate)
    points = [x0]
    for _ in range(rounds):
        for client in clients:
            client.local_round()
        new = np.mean([client.x for client in clients], axis=0)
        for client in clients:
            radius = np.mean(np.abs(new - client.x)) / 2
            client.x = new.copy()
            client.query(new.copy())
            client.explore(sync_active, sync_pool, radius)
            client.fit_weights()
        mean = np.mean([client.nu for client in clients], axis=0)
        for client in clients:
            client.nu_mean = mean
        points.append(new)
    return np.array(points)
