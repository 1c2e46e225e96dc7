"""Sets of points in the plane, float32 (n, 2)."""

import numpy as np

N = 10_000
SEED = 0  # of the points, which are the same for all runs


def swiss_roll() -> np.ndarray:
  """A spiral (scikit-learn's, seen from the end), about 1 in size."""
  from sklearn import datasets

  points, _ = datasets.make_swiss_roll(N, noise=0.5, random_state=SEED)
  return _scaled(points[:, [0, 2]])


def two_moons() -> np.ndarray:
  """Two interleaved half circles."""
  from sklearn import datasets

  points, _ = datasets.make_moons(N, noise=0.06, random_state=SEED)
  return _scaled(points)


def eight_gaussians() -> np.ndarray:
  """Eight clouds on a circle."""
  rng = np.random.default_rng(SEED)
  angle = np.pi / 4 * rng.integers(0, 8, N)
  centre = np.stack([np.cos(angle), np.sin(angle)], 1)
  return _scaled(centre + 0.08 * rng.normal(size=(N, 2)))


def _scaled(points: np.ndarray) -> np.ndarray:
  """Scales to mean 0, and variance 1 averaged over both axes."""
  centred = points - points.mean(0)
  return (centred / centred.std()).astype(np.float32)
