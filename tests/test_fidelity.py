"""FID, IS and the rest of features that need no network to make."""

import numpy as np
import pytest
import scipy.linalg

from ddpm_jax import errors
from ddpm_jax.metrics import distances
from ddpm_jax.metrics import fidelity
from ddpm_jax.metrics import inception
from ddpm_jax.metrics import running


def rows(n, d, seed=0):
  return np.random.default_rng(seed).normal(size=(n, d))


def features(n, seed=0, logits=None):
  """Of few numbers each, which none of this minds."""
  if logits is None:
    logits = rows(n, 7, seed + 2)
  return inception.Features(rows(n, 5, seed), rows(n, 4, seed + 1), logits)


def sums(parts, kept=1000):
  """Of features that come in parts, one after another."""
  total, start = None, 0
  n = sum(len(part.pool) for part in parts)
  for part in parts:
    index = np.arange(start, start := start + len(part.pool))
    added = fidelity.sums(index, part, fidelity.chosen(n, kept))
    total = fidelity.merge(total, added) if total else added
  return total


def cut(whole, *edges):
  return [
    inception.Features(*(x[a:b] for x in whole))
    for a, b in zip((0, *edges), (*edges, None), strict=True)
  ]


def inception_score(logits):
  return fidelity.inception_score(sums([features(len(logits), logits=logits)]))


def test_running_moments_are_those_of_all_rows():
  """Where the mean is a million deviations, Σ x xᵀ - n μ μᵀ keeps no digit."""
  x = rows(300, 6) + 1e6
  parts = [running.of(part) for part in np.split(x, [1, 40, 41, 200])]
  total = parts[0]
  for part in parts[1:]:
    total = running.merge(total, part)
  mean, cov = running.moments(total)
  np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-14)
  # 1e6 has ten digits left for what varies.
  np.testing.assert_allclose(cov, np.cov(x.T), rtol=0, atol=1e-8)


@pytest.mark.parametrize('ranks', [(30, 30), (5, 30), (30, 4), (4, 3), (1, 1)])
def test_frechet_is_that_of_scipys_sqrtm_at_any_rank(ranks):
  d = 12
  a, b = (
    distances.moments(rows(rank, d, seed) @ rows(d, d, 9))
    for seed, rank in enumerate(n + 1 for n in ranks)
  )
  # sqrtm of a singular matrix is sought along εI, ε -> 0, in extended steps.
  found = []
  for eps in (1e-6, 1e-8):
    root = scipy.linalg.sqrtm(
      (a.cov + eps * np.eye(d)) @ (b.cov + eps * np.eye(d))
    ).real
    shift = np.sum((a.mean - b.mean) ** 2)
    found.append(shift + np.trace(a.cov + b.cov) - 2 * np.trace(root))
  got = distances.frechet(*a, *b)
  # An eigenvalue of 0 becomes √(ε λ): a thousandth at the most.
  assert abs(got - found[1]) <= abs(found[0] - found[1]) + 1e-8 * got
  np.testing.assert_allclose(got, found[1], rtol=1e-3)


def test_batches_and_their_order_change_nothing():
  whole = features(57)
  one = fidelity.statistics(sums([whole]))
  parts = cut(whole, 20, 25, 50)
  index = [np.arange(0, 20), np.arange(20, 25), np.arange(25, 50)]
  index.append(np.arange(50, 57))
  kept = fidelity.chosen(57, 1000)
  total = None
  for i in (2, 0, 3, 1):
    part = fidelity.sums(index[i], parts[i], kept)
    total = fidelity.merge(total, part) if total else part
  other = fidelity.statistics(total)
  np.testing.assert_array_equal(one.features, other.features)
  np.testing.assert_array_equal(one.features, whole.pool)
  for a, b in ((one.pool, other.pool), (one.spatial, other.spatial)):
    np.testing.assert_allclose(a.cov, b.cov, rtol=1e-12, atol=1e-14)
  assert one.inception_score == pytest.approx(other.inception_score, rel=1e-12)
  assert one.n == other.n == 57


def test_the_score_of_equal_predictions_is_1():
  assert inception_score(np.tile(rows(1, 7), (40, 1))) == pytest.approx((1, 0))


@pytest.mark.parametrize('order', ['mixed', 'sorted'])
def test_the_score_of_certain_and_even_predictions_is_their_number(order):
  """Also where images come in the order of their classes."""
  labels = np.repeat(np.arange(7), 20)
  if order == 'mixed':
    labels = np.arange(140) // 10 % 7  # in each tenth as many
  logits = 1e4 * np.eye(7)[labels]
  assert inception_score(logits) == pytest.approx((7, 0))


def test_the_score_is_the_definition():
  logits = 3 * rows(103, 7)
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  want = []
  for split in range(10):
    q = p[split::10]
    kl = np.sum(q * np.log(q / q.mean(axis=0)), axis=1)
    want.append(np.exp(kl.mean()))
  assert inception_score(logits) == pytest.approx((np.mean(want), np.std(want)))
  # A constant is nothing to a softmax, however large.
  assert inception_score(logits + 1e5) == pytest.approx(
    (np.mean(want), np.std(want)), rel=1e-6
  )


def test_a_set_against_itself():
  x = fidelity.statistics(sums([features(60)]))
  found = fidelity.scores(x, x)
  assert found['FID@60'] == pytest.approx(0, abs=1e-12)
  assert found['sFID@60'] == pytest.approx(0, abs=1e-12)
  assert found['precision'] == found['recall'] == 1
  # A point is no pair with itself on its own side, so that it is not quite 0.
  assert found['KID'] < 0


def test_a_score_of_few_images_says_so_in_its_name():
  assert fidelity.named('FID', 9_999) == 'FID@9999'
  assert fidelity.named('FID', 10_000) == 'FID'
  x = fidelity.statistics(sums([features(60)]))
  assert 'FID' not in fidelity.scores(x, x)
  assert 'FID' in fidelity.scores(x._replace(n=50_000), x)


def test_features_that_are_kept_are_spread_over_all():
  assert fidelity.chosen(10, 100).tolist() == list(range(10))
  few = fidelity.chosen(1001, 11)
  assert few.tolist() == list(range(0, 1001, 100))
  whole = features(1001)
  kept = fidelity.statistics(sums(cut(whole, 100, 950), kept=11)).features
  np.testing.assert_array_equal(kept, whole.pool[few])
  assert fidelity.chosen(5, 0).size == 0


def test_what_a_file_does_not_tell_is_not_scored():
  x = fidelity.statistics(sums([features(60)]))
  found = fidelity.scores(x, fidelity.Statistics(x.pool))
  assert set(found) == {'FID@60', 'IS', 'IS_deviation'}


def test_what_is_not_a_number_is_not_masked():
  bad = features(20, logits=np.full((20, 7), np.nan))
  with pytest.raises(ValueError, match='finite'):
    sums([bad])


def test_statistics_come_back_and_the_common_file_is_read(tmp_path):
  pool = distances.Moments(rows(1, 2048)[0], np.eye(2048))
  spatial = distances.Moments(np.zeros(2023), np.eye(2023))
  x = fidelity.Statistics(pool, spatial, rows(3, 2048), (2.0, 0.5), 60)
  with (tmp_path / 'x.npz').open('wb') as file:
    fidelity.save(file, x, {'images': 60})
  back, whence = fidelity.load(tmp_path / 'x.npz')
  assert whence == {'images': 60}
  assert back[3:] == x[3:]
  np.testing.assert_array_equal(back.pool.mean, pool.mean)
  np.testing.assert_array_equal(back.features, x.features)

  np.savez(tmp_path / 'fid_stats.npz', mu=pool.mean, sigma=pool.cov)
  back, whence = fidelity.load(tmp_path / 'fid_stats.npz')
  assert whence == {}
  assert back[1:] == (None, None, None, None)


@pytest.mark.parametrize(
  ('arrays', 'message'),
  [
    (dict(mean=np.zeros(2)), 'no `mu`, only: mean'),
    (dict(mu=np.zeros(2048)), 'no `sigma`'),
    (dict(mu=np.zeros(768), sigma=np.eye(768)), r'\(768,\), not \(2048,\)'),
    (dict(mu=np.zeros(2048), sigma=np.eye(3)), r'`sigma` of'),
    (dict(mu=np.full(2048, np.nan), sigma=np.eye(2048)), 'not finite'),
    (dict(arr_0=np.zeros(2)), 'has images, not their statistics'),
  ],
)
def test_statistics_of_something_else_are_refused(tmp_path, arrays, message):
  np.savez(tmp_path / 'x.npz', **arrays)
  with pytest.raises(errors.UserError, match=message):
    fidelity.load(tmp_path / 'x.npz')


def test_a_file_that_is_none_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match='is not a file'):
    fidelity.load(tmp_path / 'none.npz')
  (tmp_path / 'x.npz').write_bytes(b'PK no zip')
  with pytest.raises(errors.UserError, match='cannot be read'):
    fidelity.load(tmp_path / 'x.npz')
