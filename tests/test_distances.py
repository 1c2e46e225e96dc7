"""Distances between sets of points, where the answer is known."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from ddpm_jax.metrics import distances

SMALL = 7  # A block that divides none of the sizes here.


def normal(n, d, seed=0, shift=0.0):
  return np.random.default_rng(seed).normal(size=(n, d)) + shift


def frechet(a, b):
  return distances.frechet(*distances.moments(a), *distances.moments(b))


def covariance(d, rank, seed):
  root = normal(rank, d, seed)
  return root.T @ root


def test_moments_are_numpys():
  x = normal(50, 4)
  mean, cov = distances.moments(x)
  np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
  np.testing.assert_allclose(cov, np.cov(x.T), rtol=1e-12)


@pytest.mark.parametrize('rank', [1, 3, 8])
def test_frechet_of_equal_gaussians_is_0(rank):
  mean, cov = normal(1, 8)[0], covariance(8, rank, 1)
  assert 0 <= distances.frechet(mean, cov, mean, cov) < 1e-12


@pytest.mark.parametrize('rank', [1, 3, 8])
def test_frechet_of_a_shift_is_its_square(rank):
  cov, shift = covariance(8, rank, 1), normal(1, 8)[0]
  got = distances.frechet(np.zeros(8), cov, shift, cov)
  np.testing.assert_allclose(got, shift @ shift, rtol=1e-12)


def test_frechet_of_axis_aligned_gaussians_is_that_of_their_deviations():
  """Σ (s_a - s_b)², with deviations of 0 among them."""
  s_a, s_b = np.array([0.0, 1, 2, 0]), np.array([3.0, 0, 5, 0])
  zero = np.zeros(4)
  got = distances.frechet(zero, np.diag(s_a**2), zero, np.diag(s_b**2))
  np.testing.assert_allclose(got, np.sum((s_a - s_b) ** 2), rtol=1e-12)


def test_frechet_of_lines_at_an_angle_is_exact():
  """Rank one each: tr (Σ_a Σ_b)^½ = |u·v|."""
  u, v = np.array([2.0, 1, 0]), np.array([1.0, -3, 1])
  zero = np.zeros(3)
  got = distances.frechet(zero, np.outer(u, u), zero, np.outer(v, v))
  np.testing.assert_allclose(got, u @ u + v @ v - 2 * abs(u @ v), rtol=1e-12)


def test_frechet_is_that_of_scipys_sqrtm():
  a, b = covariance(6, 20, 1), covariance(6, 20, 2)
  mean_a, mean_b = normal(2, 6)
  root = scipy.linalg.sqrtm(a @ b).real
  want = np.sum((mean_a - mean_b) ** 2) + np.trace(a + b - 2 * root)
  got = distances.frechet(mean_a, a, mean_b, b)
  np.testing.assert_allclose(got, want, rtol=1e-10)


def test_frechet_is_blind_to_order_and_to_rotation():
  a, b = normal(40, 5), 2 * normal(30, 5, 1, 1.0)
  turn = np.linalg.qr(normal(5, 5, 2))[0]
  np.testing.assert_allclose(frechet(a, b), frechet(b, a), rtol=1e-10)
  np.testing.assert_allclose(
    frechet(a @ turn, b @ turn), frechet(a, b), rtol=1e-10
  )


def test_kernel_of_point_masses_is_the_closed_form():
  """k(x, x) + k(y, y) - 2k(x, y)."""
  x, y = np.array([[1.0, 2.0]]), np.array([[0.5, -1.0]])

  def k(u, v):
    return (np.sum(u * v) / 2 + 1) ** 3

  got = distances.kernel(np.repeat(x, 5, 0), np.repeat(y, 4, 0))
  want = k(x, x) + k(y, y) - 2 * k(x, y)
  np.testing.assert_allclose(got.value, want, rtol=1e-12)
  assert got.standard_error < 1e-12


@pytest.mark.parametrize('shift', [0.0, 0.5])
def test_kernel_distance_is_unbiased(shift):
  """In one dimension it is Σ_j C(3, j) (difference of the j-th moments)²."""
  want = 3 * shift**2 + 3 * shift**4 + (shift**3 + 3 * shift) ** 2
  rng = np.random.default_rng(0)
  draws = np.array(
    [
      distances.kernel(
        rng.normal(size=(8, 1)), rng.normal(shift, 1, (11, 1)), groups=2
      ).value
      for _ in range(1000)
    ]
  )
  error = draws.std() / np.sqrt(len(draws))
  assert abs(draws.mean() - want) < 3 * error
  # Pairs of a point and itself would add E[k(x, x) - k(x, x')] (1/8 + 1/11) =
  # 24 (1/8 + 1/11) = 5.2, many standard errors.
  assert error < 0.5


@pytest.mark.parametrize(('shift', 'most'), [(0.0, 1.7), (1.0, 1.3)])
def test_kernels_standard_error_is_what_values_spread_or_a_little_more(
  shift, most
):
  rng = np.random.default_rng(0)
  estimates = [
    distances.kernel(rng.normal(size=(60, 2)), rng.normal(shift, 1, (60, 2)))
    for _ in range(150)
  ]
  spread = np.std([e.value for e in estimates])
  told = np.sqrt(np.mean([e.standard_error**2 for e in estimates]))
  assert 0.85 < told / spread < most


def test_precision_and_recall_of_identical_sets_are_1():
  x = normal(50, 4)
  assert distances.precision_recall(x, x) == (1, 1)


def test_precision_and_recall_of_repeated_points_are_1():
  """Where a point has k copies its ball has no radius."""
  x = np.repeat(normal(10, 4), 5, axis=0)
  assert distances.precision_recall(x, x) == (1, 1)


def test_precision_and_recall_of_disjoint_sets_are_0():
  x = normal(50, 4)
  assert distances.precision_recall(x, x + 100) == (0, 0)


def test_lost_modes_cost_recall_and_not_precision():
  modes = np.repeat([[0.0, 0.0], [100.0, 0.0]], 100, axis=0)
  real = normal(200, 2) + modes
  fake = normal(200, 2, seed=1)
  precision, recall = distances.precision_recall(real, fake)
  assert precision > 0.9
  assert 0.4 < recall <= 0.5
  _, coverage = distances.density_coverage(real, fake)
  assert 0.4 < coverage <= 0.5


def test_density_and_coverage_of_identical_points_are_1():
  x = np.random.default_rng(0).integers(0, 10**6, (60, 3))  # exact sums
  assert distances.density_coverage(x, x) == (1, 1)


def test_density_and_coverage_of_disjoint_sets_are_0():
  x = normal(50, 4)
  assert distances.density_coverage(x, x + 100) == (0, 0)


def test_density_and_coverage_of_one_distribution_are_as_expected():
  """1, and 1 - (n-1)...(n-k) / ((m+n-1)...(m+n-k))  (Naeem et al., lemma 2)."""
  n, m, k = 40, 30, 5
  got = np.array(
    [
      distances.density_coverage(
        normal(n, 3, seed), normal(m, 3, 10_000 + seed), k=k
      )
      for seed in range(400)
    ]
  )
  i = np.arange(1, k + 1)
  coverage = 1 - np.prod((n - i) / (m + n - i))
  errors = got.std(axis=0) / np.sqrt(len(got))
  assert np.all(np.abs(got.mean(axis=0) - [1, coverage]) < 3 * errors)


def images(n, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)


def test_nearest_finds_the_planted_copy_exactly():
  training = images(50)
  samples = images(20, seed=1)
  samples[3], samples[11] = training[41], training[0]
  training[49] = training[41]  # of equals the first is named
  rmse, index = distances.nearest(samples, training, block=SMALL)
  assert (rmse == 0).nonzero()[0].tolist() == [3, 11]
  assert index[[3, 11]].tolist() == [41, 0]


def test_nearest_is_the_root_of_the_mean_squared_difference():
  training, samples = images(50), images(20, seed=1)
  every = (samples[:, None].astype(float) - training[None]) ** 2
  every = np.sqrt(every.mean(axis=(2, 3, 4)))
  rmse, index = distances.nearest(samples, training, block=SMALL)
  np.testing.assert_array_equal(index, every.argmin(axis=1))
  np.testing.assert_allclose(rmse, every.min(axis=1), rtol=1e-12)
  black = np.zeros((1, 4, 4, 3), np.uint8)
  assert distances.nearest(black, black + 255)[0] == 255


def test_an_image_is_not_its_own_nearest_where_it_is_not_to_count():
  training = images(30)
  training[7] = training[2]
  at = np.array([2, 5, 7])
  rmse, index = distances.nearest(
    training[at], training, itself=at, block=SMALL
  )
  assert index[[0, 2]].tolist() == [7, 2]
  assert rmse[[0, 2]].tolist() == [0, 0]
  assert index[1] != 5
  assert rmse[1] > 0


def test_energy_of_equal_sets_is_0_and_of_two_points_twice_their_distance():
  x = normal(20, 3)
  assert abs(distances.energy(x, x[::-1])) < 1e-12
  got = distances.energy(np.zeros((3, 2)), np.tile([3.0, 4.0], (5, 1)))
  np.testing.assert_allclose(got, 10, rtol=1e-12)


def test_energy_in_one_dimension_is_that_of_scipy():
  """2 ∫ (F - G)², of which scipy gives the root."""
  a, b = normal(40, 1), normal(30, 1, seed=1, shift=0.5)
  want = scipy.stats.energy_distance(a[:, 0], b[:, 0]) ** 2
  np.testing.assert_allclose(distances.energy(a, b), want, rtol=1e-10)


def test_p_values_under_the_null_are_uniform():
  rng = np.random.default_rng(0)
  p = [
    distances.energy_p_value(
      rng, rng.normal(size=(12, 2)), rng.normal(size=(15, 2)), permutations=99
    )
    for _ in range(400)
  ]
  # Kolmogorov-Smirnov at 1 %; multiples of 1/100 cost at most 0.01.
  distance = scipy.stats.kstest(p, 'uniform').statistic
  assert distance < 1.63 / np.sqrt(400) + 0.01


def test_a_shift_has_the_least_p_value_there_is():
  rng = np.random.default_rng(0)
  a, b = normal(50, 2), normal(50, 2, seed=1, shift=1.0)
  assert distances.energy_p_value(rng, a, b, permutations=99) == 0.01


def permutation_p_value(statistic, rng, a, b, permutations):
  """As `distances.energy_p_value`, for any statistic, and slowly."""
  pool = np.concatenate([a, b])
  null = []
  for _ in range(permutations):
    order = rng.permutation(len(pool))
    null.append(statistic(pool[order[: len(a)]], pool[order[len(a) :]]))
  as_large = np.array(null) >= statistic(a, b) - 1e-12
  return (1 + as_large.sum()) / (1 + permutations)


def test_p_value_counts_ties_against_the_difference():
  rng = np.random.default_rng(0)
  same = np.ones((6, 2))
  for permutations in (9, 99):
    p = distances.energy_p_value(rng, same, same, permutations=permutations)
    assert p == 1
  # Of the 6 splits of these four, 2 are as far apart as theirs.
  a, b = np.array([[0.1], [0.3]]), np.array([[0.7], [0.9]])
  p = distances.energy_p_value(rng, a, b)
  assert abs(p - 1 / 3) < 4 * np.sqrt(2 / 9 / 1000)


def test_the_quick_p_value_of_energy_is_the_slow_one():
  a, b = normal(20, 2), normal(15, 2, seed=1, shift=0.3)
  quick, slow = (
    distances.energy_p_value(
      np.random.default_rng(0), a, b, permutations=50, block=SMALL
    ),
    permutation_p_value(
      distances.energy, np.random.default_rng(0), a, b, permutations=50
    ),
  )
  # Not 1 or 1/51, which would be equal for nothing.
  assert 0.02 < quick == slow < 1


@pytest.mark.parametrize(
  'function',
  [
    distances.kernel,
    distances.precision_recall,
    distances.density_coverage,
    distances.energy,
    lambda a, b, **kw: distances.kernel(a, b, groups=3, **kw),
  ],
)
def test_blocks_change_nothing(function):
  a, b = normal(40, 3), normal(30, 3, seed=1, shift=0.5)
  np.testing.assert_allclose(
    function(a, b, block=SMALL), function(a, b, block=10**6), rtol=1e-10
  )


def test_what_is_not_a_number_is_not_masked():
  x = normal(20, 3)
  bad = x.copy()
  bad[3, 1] = np.nan
  for function in (distances.kernel, distances.precision_recall, frechet):
    with pytest.raises(ValueError, match='finite'):
      function(x, bad)
  with pytest.raises(ValueError, match='at least 4 rows'):
    distances.precision_recall(x, x[:3])
