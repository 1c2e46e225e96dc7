"""q and p: identities of the paper, exact to float32 rounding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules

pytestmark = pytest.mark.usefixtures('no_nans')

T = 1000
S = schedules.linear(T)


def test_q_sample_has_the_mean_and_variance_of_t_steps_of_q_step():
  """√ᾱ_t x_0 and 1-ᾱ_t are what t-fold application of eq. 2 gives."""

  def step(carry, t):
    mean, variance = carry
    # Of a x + b ε: probe with ε = 0 for the mean, with x = 0 for the noise.
    noise = process.q_step(S, 0.0, t, 1.0)
    scale = process.q_step(S, 1.0, t, 0.0)
    mean = process.q_step(S, mean, t, 0.0)
    variance = scale**2 * variance + noise**2
    return (mean, variance), (mean, variance)

  start = (jnp.float32(0.7), jnp.float32(0))
  _, (mean, variance) = jax.lax.scan(step, start, jnp.arange(1, T + 1))
  at = jax.jit(jax.vmap(process.q_sample, (None, None, 0, None)))
  t = jnp.arange(1, T + 1)
  # A thousand products: a thousand roundings of 6e-8, at random.
  np.testing.assert_allclose(at(S, 0.7, t, 0.0), mean, rtol=2e-5)
  np.testing.assert_allclose(at(S, 0.0, t, 1.0) ** 2, variance, rtol=2e-5)


def test_q_sample_is_equation_4():
  x0, eps = jnp.full((2, 3), 0.5), jnp.full((2, 3), -1.0)
  x_t = process.q_sample(S, x0, 10, eps)
  a = np.prod(1 - np.linspace(1e-4, 0.02, T)[:10])
  np.testing.assert_allclose(x_t, a**0.5 * 0.5 - (1 - a) ** 0.5, rtol=1e-6)


@pytest.mark.parametrize('t', [1, 2, 500, T])
def test_posterior_is_bayes_rule(t):
  """q(x_{t-1} | x_t, x_0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x_0), in float64."""
  beta = np.append(0, np.linspace(1e-4, 0.02, T))
  alpha_bar = np.cumprod(1 - beta)
  x0, x_t = 0.3, -0.8
  mean, variance = process.q_posterior(S, x0, x_t, t)
  if t == 1:  # x_{t-1} is x_0, for certain
    assert variance == 0
    np.testing.assert_allclose(mean, x0, rtol=1e-6)
    return
  precision = (1 - beta[t]) / beta[t] + 1 / (1 - alpha_bar[t - 1])
  weighted = np.sqrt(1 - beta[t]) / beta[t] * x_t
  weighted += np.sqrt(alpha_bar[t - 1]) / (1 - alpha_bar[t - 1]) * x0
  np.testing.assert_allclose(variance, 1 / precision, rtol=1e-5)
  np.testing.assert_allclose(mean, weighted / precision, rtol=1e-5)


def test_x0_from_eps_inverts_q_sample():
  x0 = jax.random.normal(jax.random.key(0), (T, 5))
  eps = jax.random.normal(jax.random.key(1), (T, 5))
  t = jnp.arange(1, T + 1)
  x_t = jax.vmap(process.q_sample, (None, 0, 0, 0))(S, x0, t, eps)
  back = jax.vmap(predictions.eps.to_x0, (None, 0, 0, 0))(S, x_t, eps, t)
  # x_t's rounding, 6e-8 of about 4, is divided by √ᾱ_T = 0.0064.
  np.testing.assert_allclose(back, x0, atol=1e-4)
  early = slice(0, 500)
  np.testing.assert_allclose(back[early], x0[early], atol=2e-6)


def test_p_mean_is_equation_11():
  """μ_θ = (x_t - β_t/√(1-ᾱ_t) ε_θ) / √(1-β_t), when x̂_0 is not clipped."""
  x_t = jax.random.normal(jax.random.key(0), (7, 1))
  eps = jax.random.normal(jax.random.key(1), (7, 1))
  for t in (1, 2, 100, 900):
    denoiser = denoisers.Denoiser(S, lambda x_t, t: eps, clip=False)
    mean, _, _ = denoisers.p_mean_variance(denoiser, x_t, t)
    beta, noise = S.beta[t], jnp.sqrt(S.one_minus_alpha_bar[t])
    expected = (x_t - beta / noise * eps) / jnp.sqrt(1 - beta)
    np.testing.assert_allclose(mean, expected, atol=3e-6)


def test_clipping_keeps_x0_hat_in_range():
  x_t = jnp.linspace(-3, 3, 13)[:, None]
  denoiser = denoisers.Denoiser(S, lambda x_t, t: 0 * x_t)
  assert jnp.max(jnp.abs(denoisers.x0_hat(denoiser, x_t, 100))) == 1


def test_a_batch_of_times_is_taken_as_it_is():
  x0 = jax.random.normal(jax.random.key(0), (4, 2, 3))
  eps = jax.random.normal(jax.random.key(1), (4, 2, 3))
  t, s = jnp.array([1, 20, 500, T]), jnp.array([0, 20, 3, T - 1])
  for fn, args in (
    (process.q_sample, (x0, t, eps)),
    (process.q_step, (x0, t, eps)),
    (process.q_between, (x0, s, t, eps)),
    (process.q_posterior, (x0, eps, t)),
  ):
    fn = functools.partial(fn, S)
    whole = jax.jit(fn)(*args)
    each = jax.tree.map(
      lambda a, b: b.reshape(b.shape + (1,) * (a.ndim - b.ndim)),
      whole,
      jax.jit(jax.vmap(fn))(*args),
    )
    chex.assert_trees_all_close(whole, each, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize('t', [jnp.arange(3), jnp.ones((4, 2), int)])
def test_times_of_another_batch_are_refused_with_what_to_do(t):
  x0 = jnp.zeros((4, 2, 3))
  with pytest.raises(ValueError, match=r'scalar t, or one for each example'):
    process.q_sample(S, x0, t, x0)


def test_noise_of_an_example_does_not_depend_on_its_batch():
  keys = jax.random.split(jax.random.key(0), 8)
  whole = process.normal(keys, (3, 2))
  parts = [process.normal(keys[i : i + 2], (3, 2)) for i in range(0, 8, 2)]
  np.testing.assert_array_equal(whole, jnp.concatenate(parts))
