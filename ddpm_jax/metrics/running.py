"""Mean and covariance of rows that arrive in parts, in float64."""

from typing import NamedTuple

import numpy as np

from ddpm_jax.metrics import distances


class Running(NamedTuple):
  n: np.ndarray  # ()
  mean: np.ndarray  # (d,)
  scatter: np.ndarray  # (d, d), Σ (x - mean)(x - mean)ᵀ


def of(x: np.ndarray) -> Running:
  """The moments of one part, rows (n, d)."""
  x = np.asarray(x, np.float64)
  mean = x.mean(axis=0)
  centred = x - mean
  return Running(np.array(len(x)), mean, centred.T @ centred)


def merge(a: Running, b: Running) -> Running:
  """The moments of the rows of both  (Chan, Golub & LeVeque 1983).

  Unlike Σ x xᵀ - n μ μᵀ, this has no cancellation if the mean is large.
  """
  n = a.n + b.n
  shift = b.mean - a.mean
  return Running(
    n,
    a.mean + shift * (b.n / n),
    a.scatter + b.scatter + np.outer(shift * (a.n * b.n / n), shift),
  )


def moments(x: Running) -> distances.Moments:
  return distances.Moments(x.mean, x.scatter / (x.n - 1))
