"""Solvers of problems that are not training loops."""
