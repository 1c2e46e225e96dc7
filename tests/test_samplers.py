"""The sampler, where data are Gaussian and every answer is known."""

import functools

import gaussian
import jax
import jax.numpy as jnp
import jitted
import numpy as np
import pytest

from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import variances

T = 100
S = schedules.linear(T, 1e-3, 0.2)  # the paper's, in a tenth of the steps
N = 40_000


def keys(n: int, seed: int = 0) -> jax.Array:
  return jax.random.split(jax.random.key(seed), n)


def chain(mean, variance, sigma2, n=N):
  """x_t of n ancestral chains at t = T-1, ..., 0, and x_T."""
  denoiser = denoisers.Denoiser(
    S,
    gaussian.network(S, mean, variance),
    variance=getattr(variances, sigma2),
    clip=False,
  )
  x_T = process.normal(keys(n, 1), (1,))

  def body(x_t, t):
    k = jax.vmap(jax.random.fold_in, (0, None))(keys(n), t)
    x, _ = samplers.ancestral(denoiser, k, x_t, t)
    return x, x[:, 0]

  return jax.jit(lambda: jax.lax.scan(body, x_T, jnp.arange(T, 0, -1))[1])()


def moments(mean, variance, sigma2):
  """Mean and variance of the same chains, by recursion in float64.

  With the closed-form ε each step is affine: x_{t-1} = a x_t + b + σ_t z.
  """
  beta = np.append(0, np.linspace(1e-3, 0.2, T))
  alpha_bar = np.cumprod(1 - beta)
  m, v, out = 0.0, 1.0, []
  for t in range(T, 0, -1):
    noise = 1 - alpha_bar[t]
    total = alpha_bar[t] * variance + noise
    slope = beta[t] / total  # of β_t/√(1-ᾱ_t) E[ε | x_t]
    a = (1 - slope) / np.sqrt(1 - beta[t])
    b = slope * np.sqrt(alpha_bar[t]) * mean / np.sqrt(1 - beta[t])
    sigma = {
      'beta': beta[t],
      'beta_tilde': beta[t] * (1 - alpha_bar[t - 1]) / noise,
    }[sigma2] * (t > 1)
    m, v = a * m + b, a * a * v + sigma
    out.append((m, v))
  return np.array(out).T


@pytest.mark.parametrize('sigma2', ['beta', 'beta_tilde'])
@pytest.mark.parametrize(('mean', 'variance'), [(0.4, 0.3), (-1.0, 2.0)])
def test_samples_have_the_exact_mean_and_variance_at_every_t(
  mean, variance, sigma2
):
  x = chain(mean, variance, sigma2)
  m, v = moments(mean, variance, sigma2)
  # Five standard errors: with 400 comparisons one in 4000 runs would miss, and
  # the seed is fixed.
  assert np.all(np.abs(x.mean(1) - m) < 5 * np.sqrt(v / N))
  assert np.all(np.abs(x.var(1) / v - 1) < 5 * np.sqrt(2 / N))


def test_fixed_large_is_exact_for_standard_normal_data():
  """Section 3.2: σ² = β_t is optimal for x_0 ~ N(0, I): all x_t stay so."""
  m, v = moments(0.0, 1.0, 'beta')
  np.testing.assert_allclose(m, 0, atol=1e-12)
  np.testing.assert_allclose(v[:-1], 1, rtol=1e-12)  # no noise at t = 1
  x = chain(0.0, 1.0, 'beta')
  assert np.all(np.abs(x[:-1].var(1) - 1) < 5 * np.sqrt(2 / N))


def test_fixed_small_is_exact_for_a_single_image():
  """Section 3.2: σ² = β̃_t is optimal for one fixed x_0."""
  x = chain(0.5, 0.0, 'beta_tilde', n=2000)
  np.testing.assert_allclose(x[-1], 0.5, atol=1e-5)
  m, v = moments(0.5, 0.0, 'beta_tilde')
  alpha_bar = np.append(1, np.cumprod(1 - np.linspace(1e-3, 0.2, T)))
  # x_T is N(0, 1) instead of q(x_T | x_0): ᾱ_T = 3e-5 is what remains of it.
  np.testing.assert_allclose(v, 1 - alpha_bar[T - 1 :: -1], atol=1e-4)
  np.testing.assert_allclose(m, 0.5 * alpha_bar[T - 1 :: -1] ** 0.5, atol=5e-3)


def toy(x_t, t):
  """Some network: of x_t, of t, and of neighbouring pixels."""
  return jnp.tanh(x_t + jnp.roll(x_t, 1, axis=1)) * (t / T)[:, None]


def run(step, schedule=S, n=6, **kwargs):
  x_T = process.normal(keys(n, 1), (4,))
  return jitted.sample(step, schedule, toy, keys(n), x_T, **kwargs)


@pytest.mark.smoke
def test_scan_equals_a_python_loop():
  x_0, *_ = run(samplers.ancestral)
  x = process.normal(keys(6, 1), (4,))

  @jax.jit
  def step(x, t):
    k = jax.vmap(jax.random.fold_in, (0, None))(keys(6), t)
    return samplers.ancestral(denoisers.Denoiser(S, toy), k, x, t)[0]

  for t in range(T, 0, -1):
    x = step(x, t)
  # The same operations, fused otherwise: a hundred roundings of 6e-8.
  np.testing.assert_allclose(x_0, x, atol=1e-5)


@pytest.mark.parametrize('rows', [[2], [4, 2, 0]])
def test_an_image_does_not_depend_on_the_batch_that_it_is_drawn_in(rows):
  rows = np.array(rows)
  whole = run(samplers.ancestral).x_0
  x_T = process.normal(keys(6, 1), (4,))
  some = jitted.sample(samplers.ancestral, S, toy, keys(6)[rows], x_T[rows])
  # As above: other shapes may be fused otherwise.
  np.testing.assert_allclose(some.x_0, whole[rows], atol=1e-5)
  assert np.abs(whole[2] - whole[4]).max() > 0.1


@pytest.mark.parametrize('name', samplers.__all__)
def test_snapshots_are_predictions_of_evenly_spaced_steps(name):
  seen = []

  def step(*args):
    t = args[3]
    x_prev, x0_hat = getattr(samplers, name)(*args)
    jax.debug.callback(lambda t, x: seen.append((int(t), x)), t, x0_hat)
    return x_prev, x0_hat

  _, kept, _ = run(step, snapshots=4)
  jax.effects_barrier()
  assert kept.shape == (4, 6, 4)
  by_time = dict(seen)
  assert len(by_time) == T
  for slot, t in enumerate((76, 51, 26, 1)):
    np.testing.assert_array_equal(kept[slot], by_time[t])


@pytest.mark.parametrize('name', ['ancestral', 'dpm_solver_pp_2m'])
def test_two_parts_of_a_chain_are_the_whole(name):
  step = getattr(samplers, name)
  whole, *_ = run(step)
  x_T = process.normal(keys(6, 1), (4,))
  chain = step, S, toy, keys(6)
  half, seen, _ = jitted.sample(
    *chain, x_T, times=range(T, 40, -1), snapshots=1
  )
  previous = samplers.Previous(seen[0], jnp.full(6, 41))
  x_0, *_ = jitted.sample(
    *chain, half, times=range(40, 0, -1), previous=previous
  )
  np.testing.assert_allclose(x_0, whole, atol=1e-5)


@pytest.mark.parametrize('name', samplers.__all__)
def test_the_first_time_that_is_not_finite_is_known_of_each_example(name):
  """Told the times of T, also where steps are fewer."""
  short = schedules.stride(S, 10)

  def breaks(x_t, t):  # of example 2, at t = 50 and below
    broken = (jnp.arange(len(x_t)) == 2) & (t <= 50)
    return jnp.where(broken[:, None], jnp.nan, toy(x_t, t))

  x_T = process.normal(keys(6, 1), (4,))
  step = getattr(samplers, name)
  model = denoisers.Denoiser(short, breaks)
  drawn = samplers.sample(step, model, keys(6), x_T)
  first = 60 if name == 'heun' else 50  # which looks at x_50 before
  assert drawn.bad_t.tolist() == [0, 0, first, 0, 0, 0]
  assert np.isnan(drawn.x_0[2]).all()
  assert np.isfinite(np.delete(drawn.x_0, 2, axis=0)).all()


def test_no_snapshots_by_default():
  _, kept, _ = run(samplers.ancestral)
  assert kept.shape == (0, 6, 4)


@pytest.mark.parametrize('snapshots', [1, 10])
def test_memory_grows_with_the_snapshots_and_not_with_the_steps(snapshots):
  def temporaries(steps):
    f = functools.partial(
      samplers.sample,
      samplers.ancestral,
      denoisers.Denoiser(schedules.linear(steps), toy),
      snapshots=snapshots,
    )
    x = jnp.zeros((64, 256))
    compiled = jax.jit(f).lower(keys(64), x).compile()
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes

  # Only the tables of the schedule, a few numbers a step, may grow.
  image = 64 * 256 * 4
  assert temporaries(1000) - temporaries(50) < image


def test_the_program_does_not_grow_with_the_steps():
  def operations(steps):
    table = schedules.linear(steps)
    model = denoisers.Denoiser(table, toy)
    f = functools.partial(samplers.sample, samplers.ancestral, model)
    text = jax.jit(f).lower(keys(2), jnp.zeros((2, 4))).as_text('hlo')
    return text.count(' = ')

  assert operations(1000) == operations(10)


def test_a_strided_sampler_tells_the_network_the_original_times():
  told = []

  def spy(x_t, t):
    jax.debug.callback(lambda t: told.append(int(t[0])), t)
    return jnp.zeros_like(x_t)

  short = denoisers.strided(denoisers.Denoiser(S, spy), 5)
  x_T = process.normal(keys(2, 1), (4,))
  samplers.sample(samplers.ancestral, short, keys(2), x_T)
  jax.effects_barrier()
  assert sorted(told) == [20, 40, 60, 80, 100]


def test_strided_sampling_is_exact_where_the_full_one_is():
  """With N(0, I) data and σ² = β any stride keeps x_t standard normal."""
  short = schedules.stride(S, 7)
  net = gaussian.network(S, 0.0, 1.0)
  x_T = process.normal(keys(N, 1), (1,))
  step = jitted.reading(samplers.ancestral, clip=False)
  x_0, *_ = jitted.sample(step, short, net, keys(N), x_T)
  # The last step adds no noise: what is missing is β of the last jump.
  expected = 1 - short.beta[1]
  assert abs(x_0.var() / expected - 1) < 5 * np.sqrt(2 / N)
