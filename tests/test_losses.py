"""L_simple and the choice of t."""

import functools

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import losses
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import timesteps

S = schedules.linear()
ALL = [timesteps.uniform, timesteps.antithetic, timesteps.stratified]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def draw(choice, n, T=1000, seeds=1):
  """The t of as many batches of n, (seeds, n)."""
  one = lambda seed, i: choice(jax.random.key(seed), i, n, T)  # noqa: E731
  batch = jax.vmap(one, (None, 0))
  return jax.vmap(batch, (0, None))(jnp.arange(seeds), jnp.arange(n))


def model(network, predict=predictions.eps):
  return denoisers.Denoiser(S, network, predict)


def keys(n):
  return jax.random.split(jax.random.key(1), n)


def test_the_loss_of_a_network_that_answers_0_is_1():
  x0 = jnp.zeros((4096, 12))
  t = jnp.arange(4096) % 1000 + 1
  loss = jax.jit(functools.partial(losses.simple, model(lambda x, t: 0 * x)))
  values = loss(keys(4096), x0, t)
  assert values.shape == (4096,)
  # Mean of 49,152 squared normals: standard error √(2/49152) = 0.0064.
  assert abs(values.mean() - 1) < 5 * 0.0064


def test_the_closed_form_optimum_has_the_loss_that_theory_gives():
  """E‖ε - E[ε | x_t]‖² = ᾱ s² / (ᾱ s² + 1-ᾱ) for x_0 ~ N(0, s²)."""
  n, t, variance = 20_000, 300, 0.25
  x0 = 0.5 * jax.random.normal(jax.random.key(2), (n, 4))
  net = gaussian.network(S, 0.0, variance)
  loss = jax.jit(functools.partial(losses.simple, model(net)))
  values = loss(keys(n), x0, jnp.full(n, t))
  signal = S.alpha_bar[t] * variance
  expected = signal / (signal + S.one_minus_alpha_bar[t])
  assert abs(values.mean() / expected - 1) < 5 * np.sqrt(2 / (4 * n))


def test_the_loss_of_an_example_depends_on_no_other():
  x0 = jax.random.normal(jax.random.key(0), (8, 5))
  t = jnp.arange(1, 9) * 100
  loss = functools.partial(losses.simple, model(lambda x, t: x**2), keys(8))
  f = jax.jit(loss)
  before, after = f(x0, t), f(x0.at[3].set(9.0), t)
  changed = before != after
  assert changed.tolist() == [i == 3 for i in range(8)]


@pytest.mark.parametrize('choice', ALL)
@pytest.mark.parametrize('n', [1, 7, 128])
def test_times_are_in_1_to_T(choice, n):
  t = draw(choice, n, 10, 200)
  assert t.min() == 1
  assert t.max() == 10


@pytest.mark.parametrize('choice', ALL)
def test_times_are_uniform_over_the_batch(choice):
  t = draw(choice, 100, 10, 300)
  counts = np.bincount(t.ravel(), minlength=11)[1:]
  # 30,000 draws: 3000 ± 52 a time if independent, nearer otherwise.
  assert np.all(np.abs(counts - 3000) < 5 * 52)


def test_antithetic_halves_mirror_each_other():
  t = draw(timesteps.antithetic, 64)[0]
  np.testing.assert_array_equal(t[:32] + t[32:], 1001)


def test_stratified_draws_one_time_a_stratum():
  t = draw(timesteps.stratified, 100)[0]
  np.testing.assert_array_equal((t - 1) // 10, np.arange(100))


@pytest.mark.parametrize('choice', [timesteps.antithetic, timesteps.stratified])
def test_the_mean_time_of_a_batch_varies_less_than_with_uniform(choice):
  def spread(choice):
    return draw(choice, 32, 1000, 50).mean(1).std()

  assert spread(choice) < 0.3 * spread(timesteps.uniform)


@pytest.mark.parametrize('choice', ALL)
def test_the_time_of_an_example_follows_from_its_index_alone(choice):
  key = jax.random.key(0)
  whole = draw(choice, 16)[0]
  alone = jax.jit(choice, static_argnums=(2, 3))
  assert [alone(key, i, 16, 1000) for i in range(16)] == whole.tolist()


N = 40_000


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(objective, predict, t, seed):
  """N of them, for a network a x_t + b and its two parameters."""
  x0 = 0.3 + 0.5 * jax.random.normal(jax.random.key(8), (N, 1))
  keys = jax.random.split(jax.random.key(seed), N)

  def loss(w, key, x0):
    net = lambda x, t: w[0] * x + w[1]  # noqa: E731
    at = jnp.full(1, t)
    return objective(model(net, predict), key[None], x0[None], at)[0]

  each = jax.vmap(jax.grad(loss), (None, 0, 0))
  return each(jnp.array([0.3, 0.1]), keys, x0)


@pytest.mark.parametrize('kind', ['eps', 'x0', 'v', 'mu'])
@pytest.mark.parametrize('t', [1, 2, 100, 900])
def test_two_noises_and_one_have_the_same_gradient_and_one_varies_less(t, kind):
  """The notes' claim."""
  predict = getattr(predictions, kind)
  one = gradients(losses.one_noise, predict, t, 1)
  two = gradients(losses.two_noise, predict, t, 2)
  error = jnp.sqrt((one.var(0) + two.var(0)) / N)
  assert np.all(np.abs(one.mean(0) - two.mean(0)) < 5 * error)
  # At t = 1 there is no noise before, and both are one. A μ̃ that is far off has
  # an error beside which either noise is nothing.
  if t > 1 and kind != 'mu':
    assert np.all(one.var(0) < two.var(0))


def test_x_prev_has_the_gradient_of_its_weighted_simple_loss():
  """For ε: ‖x_{t-1} - μ_θ‖² weighs `one_noise` by β_t/(1-β_t)."""
  t, eps = 300, predictions.eps
  one_noise = gradients(losses.one_noise, eps, t, 1)
  weighted = one_noise * S.beta[t] / (1 - S.beta[t])
  got = gradients(losses.x_prev, eps, t, 2)
  error = jnp.sqrt((weighted.var(0) + got.var(0)) / N)
  assert np.all(np.abs(weighted.mean(0) - got.mean(0)) < 5 * error)


@pytest.mark.parametrize('name', ['two_noise', 'one_noise', 'x_prev'])
@pytest.mark.parametrize('kind', ['eps', 'x0', 'v', 'mu'])
def test_the_losses_of_the_notes_know_the_truth(name, kind):
  """A network that knows x_0 and ε has no loss but that of x_{t-1} itself."""
  predict = getattr(predictions, kind)
  n, t = 512, jnp.full(512, 60)
  x0 = jnp.full((n, 3), 0.4)

  def net(x_t, t):  # all data are one point, so x_t tells ε
    rest = x_t - process.per_example(S.sqrt_alpha_bar[t], x_t) * x0
    noise = jnp.sqrt(S.one_minus_alpha_bar[t])
    eps = rest / process.per_example(noise, x_t)
    return jax.vmap(predict.target, (None, 0, 0, 0))(S, x0, eps, t)

  objective = getattr(losses, name)
  loss = jax.jit(functools.partial(objective, model(net, predict)))
  got = loss(keys(n), x0, t)
  # What x_t leaves open of ε_t, and of x_{t-1}: their variances given x_t.
  left = {
    'one_noise': 0.0,
    'two_noise': 1 - S.beta[60] / S.one_minus_alpha_bar[60],
    'x_prev': S.beta_tilde[60],
  }[name]
  assert got.mean() == pytest.approx(
    float(left), rel=5 * np.sqrt(2 / (3 * n)), abs=1e-6
  )
