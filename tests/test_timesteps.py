"""t by the losses of the past; the other choices are in test_losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from ddpm_jax.diffusion import timesteps
from ddpm_jax.diffusion import training

pytestmark = pytest.mark.usefixtures('no_nans')

T, K = 5, 10


def full(losses):
  """A history in which every t always had the same loss."""
  losses = jnp.broadcast_to(jnp.array(losses)[:, None], (T, K))
  return timesteps.History(losses, jnp.full(T, K))


def test_the_probabilities_are_those_of_least_variance():
  losses = np.array([4.0, 2.0, 1.0, 0.5, 0.5])
  p = timesteps.probabilities(full(losses))
  np.testing.assert_allclose(p, 0.999 * losses / 8 + 0.001 / T, rtol=1e-6)

  def variance(p):
    return np.sum(p * (losses / (T * p)) ** 2) - losses.mean() ** 2

  assert variance(np.asarray(p)) < 1e-3 * variance(np.full(T, 1 / T))


def test_the_weighted_loss_is_unbiased():
  """Σ p_t L_t / (T p_t) is the mean, whatever the history was of."""
  p = np.asarray(timesteps.probabilities(full([4.0, 0.0, 1.0, 3.0, 0.5])))
  losses = np.array([0.3, 9.0, 0.1, 2.0, 1.0])
  assert np.sum(p * losses / (T * p)) == pytest.approx(losses.mean(), rel=1e-6)
  assert p.min() > 0  # else a t that was 0 once would never be seen again


def test_the_draws_have_the_probabilities():
  p = timesteps.probabilities(full([4.0, 2.0, 1.0, 0.5, 0.5]))
  n = 20_000
  draw = lambda i: timesteps.importance(jax.random.key(0), i, n, T, p)  # noqa: E731
  t = jax.jit(jax.vmap(draw))(jnp.arange(n))
  counts = np.bincount(t, minlength=T + 1)[1:]
  assert stats.chisquare(counts, n * np.asarray(p, float)).pvalue > 1e-4


def test_t_is_uniform_until_all_have_a_history():
  history = full([4.0, 2.0, 1.0, 0.5, 0.5])
  young = history._replace(seen=history.seen.at[3].set(K - 1))
  np.testing.assert_array_equal(
    timesteps.probabilities(young), np.full(T, np.float32(0.2))
  )


def test_the_history_holds_the_last_losses_at_each_t():
  """As a list would, whatever the order of the arrays."""
  rng, record = np.random.default_rng(0), jax.jit(timesteps.record)
  history = timesteps.no_history(T, K)
  past = [[] for _ in range(T + 1)]
  for _ in range(6):
    n = 40  # of 5 times, so that some have more than K in one batch
    t, losses = rng.integers(1, T, n), rng.random(n).astype(np.float32)
    for a, b in zip(t, losses, strict=True):
      past[a].append(b)
    index = rng.permutation(n)
    history = record(history, index, t[index], losses[index])
  assert max(map(len, past)) > 6 * K
  for t in range(1, T + 1):
    assert history.seen[t - 1] == len(past[t])
    last = past[t][-K:] or [0.0] * K
    np.testing.assert_array_equal(np.sort(history.losses[t - 1]), np.sort(last))


def noisy(params, key, batch, history):
  """The loss at t is (w - 1)² / t, but for its weight."""
  p = timesteps.probabilities(history)
  fold = functools.partial(jax.random.fold_in, key)
  t = jax.vmap(lambda i: timesteps.importance(fold(0), i, 32, T, p))(
    batch['index']
  )
  losses = (params['w'] - 1) ** 2 / t
  return losses / (T * p[t - 1]), (batch['index'], t, losses)


def test_with_a_history_the_gradient_hardly_varies():
  """Where p_t ∝ L_t the weighted loss is the same at every t."""
  w = {'w': jnp.float32(3.0)}
  state = training.TrainState.create(
    apply_fn=None,
    params=w,
    ema_params=w,
    tx=optax.sgd(0.0),
    history=timesteps.no_history(T, K),
  )
  step = jax.jit(
    functools.partial(
      training.train_step, loss_fn=noisy, key=jax.random.key(1), ema=0.9
    )
  )
  batch, norms = {'index': jnp.arange(32)}, []
  for _ in range(20):
    state, metrics = step(state, batch)
    norms.append(float(metrics['grad_norm']))
  want = 4 * np.mean(1 / np.arange(1, T + 1))
  assert norms[0] != pytest.approx(want, rel=0.01)
  # The share of 0.001 that is uniform leaves a little.
  np.testing.assert_allclose(norms[-5:], want, rtol=2e-3)
