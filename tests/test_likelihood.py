"""The bound, against likelihoods that are known."""

import functools

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import variances
from ddpm_jax.study import two_term

GRAYS = jnp.arange(256) / 127.5 - 1
decoder_log_prob = jax.jit(likelihood.decoder_log_prob)


def keys(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)


@pytest.mark.parametrize('mean', [-3.0, -1.0, 0.013, 0.9, 40.0])
@pytest.mark.parametrize('sigma', [1e-3, 0.01, 0.3, 5.0])
def test_the_decoder_spreads_a_probability_of_1_over_256_bins(mean, sigma):
  log_p = decoder_log_prob(GRAYS, mean, 2 * jnp.log(sigma))
  assert jnp.exp(log_p).sum() == pytest.approx(1, abs=2e-5)


def test_the_decoder_is_right_in_the_far_tails():
  """Where a difference of CDFs is 0 in float32, and in float64 beyond 38 σ."""
  mean, sigma = -1.0, 0.02
  x0 = GRAYS[jnp.array([3, 30, 60, 80])]
  got = decoder_log_prob(x0, mean, 2 * jnp.log(sigma))
  z = (np.asarray(x0, float) - mean) / sigma
  h = 1 / 255 / sigma
  want = stats.norm.logsf(z - h) + np.log1p(
    -np.exp(stats.norm.logsf(z + h) - stats.norm.logsf(z - h))
  )
  np.testing.assert_allclose(got, want, rtol=1e-4)
  for edge in (GRAYS[0], GRAYS[-1]):
    assert np.isfinite(decoder_log_prob(edge, -edge * 9, -9.0))


def test_the_decoder_has_a_finite_gradient_everywhere():
  gradient = jax.grad(likelihood.decoder_log_prob, (1, 2))
  f = jax.jit(jax.vmap(gradient, (0, None, None)))
  for mean, log_var in ((0.0, -9.0), (5.0, -12.0), (-1.0, 2.0)):
    for g in f(GRAYS, mean, log_var):
      assert np.all(np.isfinite(g))


@pytest.mark.parametrize('variance', [variances.beta, variances.beta_tilde])
def test_the_rmse_of_the_paper_has_the_distortion_of_the_paper(variance):
  """CIFAR-10: RMSE 0.95136 of 255 at t = 1, and 1.97 bits/dim  (appendix A).

  With β_1 in the place of β̃_2 it would be 2.09.
  """
  rng, n = np.random.default_rng(0), 400_000
  x0 = rng.integers(0, 256, n) / 127.5 - 1
  mean = np.clip(x0 + 0.95136 / 127.5 * rng.normal(size=n), -1, 1)
  log_var = variance(schedules.linear(), None, 1)
  nats = decoder_log_prob(jnp.float32(x0), jnp.float32(mean), log_var)
  # One draw of an error varies by 1.2 bits: 0.002 over all.
  bits = -float(nats.mean()) * likelihood.BITS
  assert bits == pytest.approx(1.97, abs=0.005 + 5 * 0.002)


def test_the_kl_is_that_of_two_normals():
  m1, s1, m2, s2 = 0.3, 0.5, -0.2, 0.8
  x = np.linspace(-8, 8, 200_001)
  p, q = stats.norm(m1, s1), stats.norm(m2, s2)
  want = np.sum(p.pdf(x) * (p.logpdf(x) - q.logpdf(x))) * (x[1] - x[0])
  args = m1, 2 * np.log(s1), m2, 2 * np.log(s2)
  got = likelihood.normal_kl(*map(jnp.float32, args))
  assert got == pytest.approx(want, rel=1e-5)
  assert likelihood.normal_kl(1.0, -3.0, 1.0, -3.0) == 0


def bound(schedule, network, x0, draws=1, **fields):
  """All terms of each x_0, (T, B), and L_T (B,), nats a dimension."""
  n = len(x0) * draws
  denoiser = denoisers.Denoiser(schedule, network, clip=False, **fields)

  @jax.jit
  def each(x0):
    repeated = jnp.repeat(x0, draws, axis=0)

    def at(t):
      k, times = keys(n, t), jnp.full(n, t)
      nats, _ = likelihood.terms(denoiser, k, repeated, times)
      return nats.reshape(len(x0), draws).mean(1)

    terms = jax.lax.map(at, jnp.arange(1, schedule.T + 1))
    return terms, likelihood.prior(schedule, x0)

  return each(x0)


def test_the_bound_of_standard_normal_data_is_their_likelihood():
  """With σ² = β the reverse process is exact: no gap but the last step's.

  The decoder has variance β_1 about E[x_0 | x_1], whose own error has nearly
  that variance (β_1 / (1 + ...)), so that both densities agree to O(β_1).
  """
  s = schedules.linear(30, 1e-3, 0.4)
  x0 = jnp.clip(jnp.round((jnp.linspace(-0.9, 0.9, 41) + 1) * 127.5), 0, 255)
  x0 = (x0 / 127.5 - 1)[:, None]
  net = gaussian.network(s, 0.0, 1.0)
  terms, prior = bound(s, net, x0, draws=2000)
  total = terms.sum(0) + prior
  truth = -(
    stats.norm.logpdf(np.asarray(x0[:, 0])) + np.log(2 / 255)
  )  # the mass of a bin
  gap = np.asarray(total) - truth
  # 2000 draws of a spread of about 0.7 leave an error of 0.016 a value.
  assert np.all(np.abs(gap) < 5 * 0.016)
  assert gap.mean() == pytest.approx(0, abs=5 * 0.016 / 41**0.5)


def test_the_bound_of_other_gaussian_data_lies_above_by_the_known_gap():
  """E[bound] - entropy = Σ_t KL between Gaussians of the same mean, for then
  the mean of p is exact and only its variance, β or β̃, is wrong."""
  s = schedules.linear(40, 1e-3, 0.3)
  variance, n = 0.04, 4000
  rng = np.random.default_rng(0)
  x0 = jnp.asarray(rng.normal(0, variance**0.5, (n, 1)), jnp.float32)
  net = gaussian.network(s, 0.0, variance)
  gaps = {}
  for choice in (variances.beta, variances.beta_tilde):
    terms, prior = bound(s, net, x0, variance=choice)
    # t = 1 apart: there the decoder counts bins, of which no closed form.
    got = float(terms[1:].mean(1).sum() + prior.mean())
    alpha_bar, n_bar = (
      np.float64(s.alpha_bar),
      np.float64(s.one_minus_alpha_bar),
    )
    t = np.arange(2, s.T + 1)
    weight = np.sqrt(alpha_bar[t - 1]) * np.float64(s.beta)[t] / n_bar[t]
    left = variance * n_bar[t] / (alpha_bar[t] * variance + n_bar[t])
    var_p = np.float64(getattr(s, choice.__name__))[t]
    var_q = np.float64(s.beta_tilde)[t]
    kl = 0.5 * (np.log(var_p / var_q) + (var_q + weight**2 * left) / var_p - 1)
    mean2 = alpha_bar[-1] * variance
    prior_kl = 0.5 * (n_bar[-1] + mean2 - 1 - np.log(n_bar[-1]))
    want = kl.sum() + prior_kl
    assert got == pytest.approx(want, rel=0.05)
    gaps[choice.__name__] = want
  assert gaps['beta'] != pytest.approx(gaps['beta_tilde'], rel=0.05)


def test_uniform_noise_costs_at_least_8_bits():
  s = schedules.linear(20, 1e-3, 0.5)
  x0 = jax.random.randint(jax.random.key(0), (500, 2), 0, 256) / 127.5 - 1
  # The best network for it would not do better; this one does worse.
  net = gaussian.network(s, 0.0, float(x0.var()))
  terms, prior = bound(s, net, x0)
  bits = (terms.sum(0) + prior) * likelihood.BITS
  assert bits.mean() > 8


def test_one_step_is_the_bound_of_a_vae():
  """T = 1: KL(q(z|x) ‖ p(z)) - E log p(x|z), the two terms of an ELBO."""
  s = schedules.from_beta(np.array([0.7]))
  net = gaussian.network(s, 0.1, 0.3)
  x0 = GRAYS[jnp.array([10, 200, 128])][:, None]
  terms, prior = bound(s, net, x0)
  assert terms.shape == (1, 3)
  z_mean, z_var = jnp.sqrt(0.3) * x0, 0.7
  kl = 0.5 * (z_var + z_mean**2 - 1 - jnp.log(z_var))
  np.testing.assert_allclose(prior, kl[:, 0], rtol=1e-5)
  z = z_mean + jnp.sqrt(z_var) * process.normal(keys(3, 1), (1,))
  out = net(z, jnp.ones(3, int))
  x_hat = (z - jnp.sqrt(0.7) * out) / jnp.sqrt(0.3)
  log_p = decoder_log_prob(x0, x_hat, jnp.log(0.7))
  np.testing.assert_allclose(terms[0], -log_p[:, 0], rtol=1e-4)


def test_monte_carlo_over_t_is_unbiased():
  s = schedules.linear(25, 1e-3, 0.4)
  net = gaussian.network(s, 0.0, 0.2)
  x0 = GRAYS[jnp.array([90, 160])][:, None]
  exact, _ = bound(s, net, x0, draws=800)
  n = 30_000
  t = jax.random.randint(jax.random.key(1), (n,), 1, s.T + 1)
  many = jnp.tile(x0, (n // 2, 1))
  denoiser = denoisers.Denoiser(s, net, clip=False)
  terms = jax.jit(functools.partial(likelihood.terms, denoiser))
  nats, _ = terms(keys(n, 2), many, t)
  estimate = s.T * nats
  error = estimate.std() / np.sqrt(n)
  assert abs(estimate.mean() - exact.sum(0).mean()) < 5 * error


def test_the_two_term_form_is_the_three_term_form():
  """E log p(x_T) + Σ E log p(x_{t-1}|x_t)/q(x_t|x_{t-1}), by Monte Carlo."""
  s = schedules.linear(10, 0.02, 0.5)
  net = gaussian.network(s, 0.0, 0.2)
  n = 20_000
  x0 = jnp.full((n, 1), GRAYS[150])
  denoiser = denoisers.Denoiser(s, net, clip=False)
  form = jax.jit(functools.partial(two_term.bound, denoiser))
  parts = form(keys(n, 3), x0)
  two = parts.terms.sum(1) + parts.prior
  terms, prior = bound(s, net, x0)
  three = terms.sum(0) + prior
  error = np.sqrt((two.var() + three.var()) / n)
  assert abs(two.mean() - three.mean()) < 5 * error


def test_a_normal_has_the_density_that_it_has():
  x, mean, var = 0.7, -0.2, 0.3
  got = two_term.log_normal(x, mean, np.log(var))
  assert got == pytest.approx(stats.norm(mean, np.sqrt(var)).logpdf(x))
