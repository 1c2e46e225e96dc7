"""Distances between two sets of points (n, d), by NumPy in float64.

Functions that compare all pairs work in blocks of `block` by `block` rows, so
that memory does not grow with the square of n.
"""

from collections.abc import Callable
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
  mean: np.ndarray  # (d,)
  cov: np.ndarray  # (d, d), divided by n - 1


class Estimate(NamedTuple):
  value: float
  standard_error: float


def moments(features: np.ndarray) -> Moments:
  """Mean and covariance of features (n, d), n ≥ 2."""
  x = _points(features, 2)
  mean = x.mean(axis=0)
  centred = x - mean
  return Moments(mean, centred.T @ centred / (len(x) - 1))


def frechet(
  mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
  """‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2(Σ_a Σ_b)^½)  (Dowson & Landau 1982).

  The squared 2-Wasserstein distance of two Gaussians; for Inception's features
  it is FID (Heusel et al. 2017, eq. 6). With Σ = F Fᵀ, tr (Σ_a Σ_b)^½ is the
  sum of the singular values of F_aᵀ F_b: real and stable for a Σ of any rank,
  whereas `scipy.linalg.sqrtm` needs a multiple of I added.
  """
  mean_a, cov_a, mean_b, cov_b = (
    np.asarray(x, np.float64) for x in (mean_a, cov_a, mean_b, cov_b)
  )
  product = _factor(cov_a).T @ _factor(cov_b)
  if len(product) > product.shape[1]:
    product = product.T
  # Many times faster than singular values, and accurate enough: the factors
  # have full rank, so that there are no eigenvalues of 0 to be rounded.
  values = np.linalg.eigvalsh(product @ product.T)
  overlap = np.sqrt(np.maximum(values, 0)).sum()
  difference = mean_a - mean_b
  distance = difference @ difference + np.trace(cov_a + cov_b) - 2 * overlap
  return float(np.maximum(distance, 0))  # against rounding; NaN stays NaN


def _factor(cov: np.ndarray) -> np.ndarray:
  """F (d, rank) of Σ = F Fᵀ, by Cholesky's method with pivots."""
  from scipy.linalg import lapack  # slow to import, not needed in training

  lower, pivots, rank, _ = lapack.dpstrf(cov, lower=1)
  factor = np.empty((len(cov), rank))
  factor[pivots - 1] = np.tril(lower)[:, :rank]
  return factor


def kernel(
  a: np.ndarray, b: np.ndarray, *, groups: int = 10, block: int = 1024
) -> Estimate:
  """Unbiased MMD² under the kernel (x·y/d + 1)³; it may be negative.

  Gretton et al. 2012, eq. 3; for Inception's features it is the kernel
  inception distance  (Bińkowski et al. 2018, section 4). It uses all pairs. KID
  is often a mean over subsets of 1000, which has the same expectation.

  The standard error is a jackknife estimate, leaving out one of `groups` random
  groups of both sets at a time. If a and b are alike, it is up to √2 too large.

  Raises:
    ValueError: If there are fewer than 4 points.
  """
  rng = np.random.default_rng(0)
  a, b = _points(a, 4), _points(b, 4)
  groups = min(groups, len(a) // 2, len(b) // 2)
  # (n, groups): the group of each row, one-hot.
  of_a, of_b = (
    np.eye(groups)[rng.permutation(len(x)) % groups] for x in (a, b)
  )

  def sums(x: np.ndarray, of_x: np.ndarray) -> np.ndarray:
    """Σ k over pairs of different points, for each two groups of x."""
    own = (np.sum(x * x, axis=1) / x.shape[1] + 1) ** 3
    return _sum(_cubic, x, x, block, of_x, of_x) - np.diag(own @ of_x)

  aa, bb = sums(a, of_a), sums(b, of_b)
  ab = _sum(_cubic, a, b, block, of_a, of_b)
  sizes_a, sizes_b = of_a.sum(axis=0), of_b.sum(axis=0)

  def estimate(kept: np.ndarray) -> float:
    n, m = sizes_a[kept].sum(), sizes_b[kept].sum()
    pairs = np.ix_(kept, kept)
    return (
      aa[pairs].sum() / (n * (n - 1))
      + bb[pairs].sum() / (m * (m - 1))
      - 2 * ab[pairs].sum() / (n * m)
    )

  every = np.arange(groups)
  without = np.array([estimate(every[every != g]) for g in every])
  error = np.sqrt((groups - 1) * np.var(without))
  return Estimate(float(estimate(every)), float(error))


def precision_recall(
  real: np.ndarray, fake: np.ndarray, *, k: int = 3, block: int = 1024
) -> tuple[float, float]:
  """Share of fakes inside the real set, and of real points inside the fakes.

  A point is inside a set if it is no farther from some point of the set than
  that point's k-th neighbour is  (Kynkäänniemi et al. 2019, eq. 1-2).
  """
  real, fake = _points(real, k + 1), _points(fake, k + 1)

  def share(points: np.ndarray, centres: np.ndarray) -> float:
    held, _ = _count(
      points, centres, _radii2(centres, k, block), np.less_equal, block
    )
    return float(np.mean(held > 0))

  return share(fake, real), share(real, fake)


def density_coverage(
  real: np.ndarray, fake: np.ndarray, *, k: int = 5, block: int = 1024
) -> tuple[float, float]:
  """Mean number of real balls around a fake, over k; share of balls with fakes.

  A real point's ball reaches to its k-th neighbour, which is outside  (Naeem et
  al. 2020 and the authors' code). For equally many reals and fakes of the same
  distribution, the expected density is 1 and the coverage near 1 - 2^-k.
  """
  real, fake = _points(real, k + 1), _points(fake, 1)
  held, holds = _count(fake, real, _radii2(real, k, block), np.less, block)
  return float(held.sum() / (k * len(fake))), float(np.mean(holds > 0))


def nearest(
  images: np.ndarray,
  training_images: np.ndarray,
  *,
  itself: np.ndarray | None = None,
  block: int = 1024,
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the nearest training image of each image, by pixel differences.

  Sums of squares of uint8 are exact in float64: a copy is at distance 0.

  Args:
    images: (n, H, W, C), uint8.
    training_images: (m, H, W, C), uint8.
    itself: (n,), a training image to exclude for each image: its own index, if
      real images are compared with the others.
    block: Images by images that are compared at once.

  Returns:
    Root mean squared differences (n,), in 0..255; indices (n,), the first of
    equally near images.
  """
  if images.shape[1:] != training_images.shape[1:]:
    raise ValueError(
      f'images are {images.shape[1:]}, training images '
      f'{training_images.shape[1:]}'
    )
  n, m = len(images), len(training_images)
  if m < (1 if itself is None else 2):
    raise ValueError(f'{m} training images are too few')
  pixels = int(np.prod(images.shape[1:]))
  best, index = np.full(n, np.inf), np.zeros(n, np.int64)
  for rows in _slices(n, block):
    x = images[rows].reshape(-1, pixels).astype(np.float64)
    for columns in _slices(m, block):
      y = training_images[columns].reshape(-1, pixels).astype(np.float64)
      d2 = _squared_distances(x, y)
      if itself is not None:
        d2[itself[rows, None] == np.arange(columns.start, columns.stop)] = (
          np.inf
        )
      at = d2.argmin(axis=1)
      d2 = d2[np.arange(len(at)), at]
      nearer = d2 < best[rows]
      best[rows] = np.where(nearer, d2, best[rows])
      index[rows] = np.where(nearer, at + columns.start, index[rows])
  return np.sqrt(best / pixels), index


def energy(a: np.ndarray, b: np.ndarray, *, block: int = 1024) -> float:
  """2 E‖X - Y‖ - E‖X - X'‖ - E‖Y - Y'‖ ≥ 0 of two sets, as distributions.

  Székely & Rizzo 2013. Pairs of a point and itself count, so that it is 0 for
  equal sets and for no others.
  """
  a, b = _points(a, 1), _points(b, 1)

  def mean(x: np.ndarray, y: np.ndarray) -> float:
    w, v = (np.full((n, 1), 1 / n) for n in (len(x), len(y)))
    return _sum(_distances, x, y, block, w, v).item()

  return 2 * mean(a, b) - mean(a, a) - mean(b, b)


def energy_p_value(
  rng: np.random.Generator,
  a: np.ndarray,
  b: np.ndarray,
  *,
  permutations: int = 999,
  block: int = 1024,
) -> float:
  """p-value of `energy`, from random permutations of the pooled points.

  The energy distance is -wᵀDw, for the distances D of the pooled points, w =
  1/n for points of a and w = -1/m for points of b. A permutation shuffles w.
  """
  pool = np.concatenate([_points(a, 1), _points(b, 1)])
  weights = np.empty((len(pool), permutations + 1))
  own = np.repeat([1 / len(a), -1 / len(b)], [len(a), len(b)])
  weights[:, 0] = own
  for i in range(1, permutations + 1):
    weights[rng.permutation(len(pool)), i] = own
  energies = np.zeros(permutations + 1)
  for rows in _slices(len(pool), block):
    for columns in _slices(len(pool), block):
      distances = _distances(pool[rows], pool[columns])
      energies -= np.sum(weights[rows] * (distances @ weights[columns]), axis=0)
  return _p_value(energies[0], energies[1:])


def _p_value(observed: float, null: np.ndarray) -> float:
  if not np.isfinite(observed):
    raise ValueError(f'the statistic is {observed}')
  # Statistics that differ only by the order of summation count as equal.
  as_large = null >= observed - 1e-10 * abs(observed)
  return float((1 + as_large.sum()) / (1 + len(null)))


def _points(x: np.ndarray, least: int) -> np.ndarray:
  """Converts to float64 (n, d), and checks that n is at least `least`."""
  x = np.asarray(x, np.float64)
  if x.ndim != 2 or len(x) < least:
    raise ValueError(
      f'expected (n, d) with at least {least} rows, got {x.shape}'
    )
  if not np.isfinite(x).all():
    raise ValueError('not every feature is a finite number')
  return x


def _slices(n: int, block: int) -> Iterator[slice]:
  for start in range(0, n, block):
    yield slice(start, min(start + block, n))


def _sum(
  function: Callable[[np.ndarray, np.ndarray], np.ndarray],
  a: np.ndarray,
  b: np.ndarray,
  block: int,
  weights_a: np.ndarray,
  weights_b: np.ndarray,
) -> np.ndarray:
  """Σ_ij w_i f(a_i, b_j) v_j, for each pair of columns of the weights w, v."""
  total = np.zeros((weights_a.shape[1], weights_b.shape[1]))
  for rows in _slices(len(a), block):
    for columns in _slices(len(b), block):
      values = function(a[rows], b[columns])
      total += weights_a[rows].T @ (values @ weights_b[columns])
  return total


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  k = x @ y.T / x.shape[1] + 1
  return k * k * k  # many times faster than k**3


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """‖x_i - y_j‖² as ‖x‖² + ‖y‖² - 2x·y; what is only rounding becomes 0."""
  scale = np.sum(x * x, axis=1)[:, None] + np.sum(y * y, axis=1)
  d2 = scale - 2 * (x @ y.T)
  d2[d2 < 1e-12 * scale] = 0
  return d2


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  return np.sqrt(_squared_distances(x, y))


def _radii2(x: np.ndarray, k: int, block: int) -> np.ndarray:
  """Squared distance of each point to its k-th nearest other point, (n,)."""
  radii2 = np.empty(len(x))
  for rows in _slices(len(x), block):
    least = np.full((rows.stop - rows.start, k), np.inf)
    for columns in _slices(len(x), block):
      d2 = _squared_distances(x[rows], x[columns])
      if rows == columns:
        np.fill_diagonal(d2, np.inf)
      least = np.partition(np.hstack([least, d2]), k - 1, axis=1)[:, :k]
    radii2[rows] = least[:, -1]
  return radii2


def _count(
  points: np.ndarray,
  centres: np.ndarray,
  radii2: np.ndarray,
  compare: Callable[..., np.ndarray],
  block: int,
) -> tuple[np.ndarray, np.ndarray]:
  """How many balls hold each point, and how many points each ball holds."""
  held, holds = np.zeros(len(points), int), np.zeros(len(centres), int)
  for rows in _slices(len(points), block):
    for columns in _slices(len(centres), block):
      d2 = _squared_distances(points[rows], centres[columns])
      inside = compare(d2, radii2[columns])
      held[rows] += inside.sum(axis=1)
      holds[columns] += inside.sum(axis=0)
  return held, holds
