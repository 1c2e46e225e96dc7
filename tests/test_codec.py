"""The codec's mathematics: what is told is a sample of q, and is short."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddpm_jax.compression import codec
from ddpm_jax.compression import file_format
from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules

S = schedules.linear(20, 0.01, 0.4)
candidates = jax.jit(codec.candidates)
group_sums = jax.jit(codec.group_sums)


def words(n, seed=0):
  return jax.random.bits(jax.random.key(seed), (n, 2), jnp.uint32)


@functools.cache
def told(gap, var, var_p, n, log2_candidates):
  """(n, D) candidates, and samples less the mean of p, of one group each."""
  D = len(gap)
  row = jnp.array(gap)[None]
  size = jnp.full(1, len(codec.sizes(D)) - 1)

  @jax.jit
  @jax.vmap
  def one(w):
    chosen = codec.choose(w, row, var, var_p, size, log2_candidates)
    z, _ = codec.candidates(w, chosen, jnp.arange(D))
    return chosen[0], jnp.sqrt(var_p) * z[0]

  return [np.asarray(x) for x in one(words(n))]


def kl(gap, var, var_p):
  """Of a group, in bits."""
  each = likelihood.normal_kl(np.array(gap), np.log(var), 0.0, np.log(var_p))
  return float(jnp.sum(each)) * likelihood.BITS


GAUSSIANS = [
  ((0.0,), 1.0, 1.0),
  ((1.5,), 0.5, 1.0),
  ((1.0, -0.5, 0.3), 1.0, 1.2),
  ((0.7,) * 6, 1.0, 1.0),
]


@pytest.mark.parametrize(('gap', 'var', 'var_p'), GAUSSIANS)
def test_what_is_told_is_a_sample_of_q(gap, var, var_p):
  """Kolmogorov-Smirnov, along the mean of q and along the first axis.

  A right sampler fails at 1e-3 once in a thousand, and the keys are fixed.
  """
  chosen, y = told(gap, var, var_p, 2000, 10)
  assert np.all(chosen == chosen[:, :1])  # one for the group
  mean, sigma = np.array(gap), var**0.5
  along = mean / max(np.linalg.norm(mean), 1e-9)
  noise = (y - mean) / sigma
  assert stats.kstest(noise[:, 0], 'norm').pvalue > 1e-3
  if mean.any():
    assert stats.kstest(noise @ along, 'norm').pvalue > 1e-3


@pytest.mark.parametrize(('gap', 'var', 'var_p'), GAUSSIANS)
def test_its_length_is_within_the_bound(gap, var, var_p):
  """E log2 K ≤ KL + log2(e)/e + 1  (Li & El Gamal 2018, theorem 1)."""
  chosen, _ = told(gap, var, var_p, 2000, 10)
  length = np.log2(chosen[:, 0] + 1.0)
  error = length.std() / len(length) ** 0.5
  most = kl(gap, var, var_p) + np.log2(np.e) / np.e + 1
  assert length.mean() <= most + 3 * error


@pytest.mark.parametrize(('gap', 'var', 'var_p'), GAUSSIANS)
def test_its_bits_are_within_the_bound(gap, var, var_p):
  """A number of E log2 K ≤ b has a code of b + log2(b + 1) + 1 (the same).

  Ours learns its odds, for which half a bit each is left.
  """
  chosen, _ = told(gap, var, var_p, 2000, 10)
  D, (N, _) = len(gap), chosen.shape
  rules = file_format.Rules(codec.sizes(D), [1.0])
  size = np.full((1, N), len(rules.sizes) - 1)
  _, (bits,), _ = file_format.write(
    {}, rules, size, chosen[None], np.zeros(1, int)
  )
  b = kl(gap, var, var_p) + np.log2(np.e) / np.e + 1
  assert bits / N <= b + np.log2(b + 1) + 1.5


def test_of_a_few_symbols_each_is_told_as_often_as_q_says():
  """Discrete q and p: the representation itself, without a Gaussian."""
  p = np.array([0.4, 0.3, 0.2, 0.1])
  q = np.array([0.05, 0.15, 0.3, 0.5])
  n, N = 20_000, 256  # q/p is 5 at most: past 256 nothing is ever told

  def told(key):
    k_z, k_a = jax.random.split(key)
    z = jax.random.categorical(k_z, jnp.log(p), shape=(N,))
    arrivals = jnp.cumsum(jax.random.exponential(k_a, (N,)))
    return z[jnp.argmax(codec.score(jnp.log(q / p)[z], arrivals))]

  drawn = jax.jit(jax.vmap(told))(jax.random.split(jax.random.key(0), n))
  counts = np.bincount(drawn, minlength=4)
  assert stats.chisquare(counts, n * q).pvalue > 1e-4


def test_what_both_know_already_is_told_in_no_bits():
  chosen, _ = told((0.0,), 1.0, 1.0, 2000, 10)
  assert not chosen.any()


def test_with_one_candidate_a_sample_is_of_p():
  chosen, y = told((3.0,), 1.0, 2.0, 2000, 0)
  assert not chosen.any()
  assert stats.kstest(y[:, 0] / 2**0.5, 'norm').pvalue > 1e-3


def test_candidates_are_normal_and_their_waits_exponential():
  i, d = jnp.arange(300), jnp.arange(20)[:, None]
  z, e = map(np.asarray, candidates(words(1)[0], i, d))
  assert stats.kstest(z.ravel(), 'norm').pvalue > 1e-3
  assert stats.kstest(e.ravel(), 'expon').pvalue > 1e-3
  # They are all different, and no two rows or columns go together.
  assert np.abs(np.corrcoef(z)[~np.eye(20, dtype=bool)]).max() < 0.25
  assert abs(np.corrcoef(z.ravel(), e.ravel())[0, 1]) < 0.05


def test_a_candidate_is_the_same_alone():
  z, _ = candidates(words(1)[0], jnp.arange(50), jnp.arange(8)[:, None])
  alone, _ = candidates(words(1)[0], jnp.array(41), jnp.array(5))
  np.testing.assert_allclose(alone, z[5, 41], rtol=1e-5)


@pytest.mark.parametrize('D', [1, 2, 7, 64, 100])
def test_groups_of_every_size_hold_all_dimensions(D):
  x = np.random.default_rng(0).normal(size=(D, 3)).astype(np.float32)
  sizes = codec.sizes(D)
  assert sizes[0] == 1
  assert sizes[-1] >= D
  for m, sums in zip(sizes, group_sums(x), strict=True):
    parts = [x[i : i + m].sum(0) for i in range(0, D, m)]
    np.testing.assert_allclose(sums, parts, atol=1e-4)


def test_groups_are_the_largest_within_the_limit():
  nats = np.random.default_rng(0).exponential(size=(50, 30)).astype(np.float32)
  sizes, most = codec.sizes(30), 6.0
  which = np.asarray(jax.jit(codec.group_size)(nats, most))
  largest = [x.max(0) for x in map(np.asarray, group_sums(nats.T))]
  for n, j in enumerate(which):
    fits = [i for i in range(len(sizes)) if largest[i][n] <= most]
    assert j == max(fits, default=0)
  assert len(set(which)) > 2


def test_jumps_go_from_T_to_1_by_the_same_noise_levels():
  table = schedules.linear()
  denoiser = denoisers.Denoiser(table, half)
  for steps in (1, 2, 30, 999):
    short = codec.jumps(denoiser, steps).schedule
    assert len(short.beta) == steps + 2
    assert list(short.time[:2]) == [0, 1]
    assert int(short.time[-1]) == 1000
    assert np.all(np.diff(np.asarray(short.time)) > 0)
    there = np.asarray(table.alpha_bar)[np.asarray(short.time)]
    np.testing.assert_allclose(short.alpha_bar, there, rtol=1e-5)
  for steps in (0, 1000):
    with pytest.raises(ValueError, match='steps must be in'):
      codec.jumps(denoiser, steps)


def test_what_is_expected_is_the_mean_of_KL():
  """½ log2(σ²/β̃) is KL(q ‖ p) where σ² - β̃ is the mean of the squared gap."""
  short, squares = jumps(half, 4).schedule, np.array([0.5, 0.2, 0.1, 0.01])
  found = codec.expected(short, squares)
  for bits, square, k in zip(found, squares, (5, 4, 3, 2), strict=True):
    of_x0, _ = predictions.posterior_coefs(short, k)
    var, gap = short.beta_tilde[k], of_x0 * square**0.5
    exact = likelihood.normal_kl(gap, jnp.log(var), 0.0, jnp.log(var + gap**2))
    np.testing.assert_allclose(bits, exact * likelihood.BITS, rtol=1e-4)


def jumps(network, steps, predict=predictions.eps):
  return codec.jumps(denoisers.Denoiser(S, network, predict), steps)


def both_ways(network, key, x0, squares, told=None, predict=predictions.eps):
  """One side of the codec: the sender, or the receiver if it is `told`."""
  (B, D), steps = (len(x0), x0[0].size), len(squares)
  nothing = codec.Code(
    jnp.zeros((steps, B), jnp.int32), jnp.zeros((steps, B, D), jnp.int32)
  )
  return codec.run(
    *(jumps(network, steps, predict), key),
    process.normal(jax.random.split(key, B), x0.shape[1:]),
    rules=codec.Rules(8, 6.0),
    squares=squares,
    code=nothing if told is None else told,
    x0=x0,
    sending=jnp.array(told is None),
  )


def half(x_t, t):
  """Some network."""
  return 0.5 * x_t + 0.01 * t.reshape(-1, *[1] * (x_t.ndim - 1))


SQUARES = jnp.array([0.5, 0.3, 0.2, 0.1, 0.05])
X0 = jnp.array(
  np.random.default_rng(0).uniform(-1, 1, (3, 4, 4, 1)), jnp.float32
)


def test_the_receiver_is_in_lockstep_under_jit():
  """To the last bit, and having seen nothing of the images."""
  # One program for both, as `sending` is traced.
  run = jax.jit(
    lambda key, x0, code, sending: codec.run(
      *(jumps(half, 5), key),
      process.normal(jax.random.split(key, 3), (4, 4, 1)),
      rules=codec.Rules(8, 6.0),
      squares=SQUARES,
      code=code,
      x0=x0,
      sending=sending,
    )
  )
  key = jax.random.key(1)
  nothing = codec.Code(
    jnp.zeros((5, 3), jnp.int32), jnp.zeros((5, 3, 16), jnp.int32)
  )
  sent = run(key, X0, nothing, True)
  got = run(key, jnp.zeros_like(X0), sent.code, False)
  np.testing.assert_array_equal(got.check, sent.check)
  np.testing.assert_array_equal(got.shown, sent.shown)
  assert np.all(sent.nats > 0)
  assert not np.any(got.nats)
  assert run._cache_size() == 1
  # The first two steps alone are worth what they were worth before.
  part = jax.tree.map(lambda x: x.at[2:].set(0), sent.code)
  early = run(key, jnp.zeros_like(X0), part, False)
  np.testing.assert_array_equal(early.check[:3], sent.check[:3])
  np.testing.assert_array_equal(early.shown[:3], sent.shown[:3])
  assert np.any(early.check[3:] != sent.check[3:])


def test_x_1_has_the_distribution_of_q_whatever_the_network():
  """x_1 of all steps is of q(x_1 | x_0), for the chain of q ends there.

  The network answers x_t for x̂_0, so that the last x̂_0 is x_1; it is off by
  half a gray of 255, a twentieth of q's standard deviation.
  """
  x0 = jnp.array([[0.3, -0.2, 0.1]])

  @jax.jit
  @jax.vmap
  def one(key):
    return both_ways(
      lambda x_t, t: x_t, key, x0, SQUARES, predict=predictions.x0
    ).shown[-1, 0]

  shown = one(jax.random.split(jax.random.key(0), 1000)) / 127.5 - 1
  noise = shown - np.sqrt(S.alpha_bar[1]) * x0
  noise = np.asarray(noise / np.sqrt(S.one_minus_alpha_bar[1]))
  for column in noise.T:
    assert stats.kstest(column, 'norm').pvalue > 1e-3
  assert np.abs(np.corrcoef(noise.T)[~np.eye(3, dtype=bool)]).max() < 0.12


def test_errors_are_those_of_x0_hat_under_q():
  """x̂_0 = 0 is wrong by x_0 itself, at every step."""
  keys = jax.random.split(jax.random.key(0), 3)
  zero = lambda x_t, t: 0 * x_t  # noqa: E731
  errors = functools.partial(codec.errors, jumps(zero, 5, predictions.x0))
  squares = jax.jit(errors)(keys, X0)
  exact = np.square(X0).mean((1, 2, 3))
  np.testing.assert_allclose(squares, np.tile(exact, (5, 1)), rtol=1e-5)


def test_a_codec_of_one_step_has_nothing_to_send():
  denoiser = denoisers.Denoiser(schedules.from_beta([0.5]), half)
  with pytest.raises(ValueError, match=r'schedule\.T of 2 or more'):
    codec.jumps(denoiser, 1)
