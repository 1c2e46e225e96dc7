"""Samplers for few steps: their orders, limits and identities.

Data are Gaussian, so that ε is known and the probability-flow ODE is solved in
closed form: with x_0 ~ N(m, v), x_t - √ᾱ_t m goes as √(ᾱ_t v + 1-ᾱ_t).
"""

import functools
import json
import shutil

import gaussian
import jax
import jax.numpy as jnp
import jitted
import numpy as np
import pytest
from PIL import Image

from configs import base
from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax import validate
from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import editing
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import spacings
from ddpm_jax.diffusion import variances
from ddpm_jax.study import few_steps

T = 4096
S = schedules.linear(T, 0.1 / T, 20 / T)
M, V = 0.4, 0.3
NAMES = sorted(samplers.__all__)
FIXED = ['ddim', 'dpm_solver_pp_2m', 'heun']  # without noise


def keys(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)


@functools.cache
def step(name, eta=None, **fields):
  """The same object for the same options, so that `run` is compiled once."""
  made = getattr(samplers, name)
  made = made if eta is None else functools.partial(made, eta=eta)
  return jitted.reading(made, **{'clip': False, **fields})


@functools.partial(jax.jit, static_argnames=('solver', 'times'))
def run(solver, table, x, times=None):
  net = gaussian.network(table, M, V)
  own = table._replace(time=jnp.arange(len(table.time)))
  denoiser = denoisers.Denoiser(own, net)
  return samplers.sample(solver, denoiser, keys(len(x)), x, times=times)[0]


def flow(table, x, s, t):
  """Where the ODE leads x_s to, at t."""
  signal = jnp.sqrt(table.alpha_bar)
  scale = jnp.sqrt(table.alpha_bar * V + table.one_minus_alpha_bar)
  return signal[t] * M + scale[t] / scale[s] * (x - signal[s] * M)


def orders(error, steps):
  errors_ = np.array([error(n) for n in steps])
  return np.log2(errors_[:-1] / errors_[1:])


def float64(table):
  # Rounded tables, but the same ones for solver and solution.
  return jax.tree.map(
    lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, table
  )


@pytest.mark.parametrize(
  ('name', 'order'), [('ddim', 1), ('dpm_solver_pp_2m', 2), ('heun', 2)]
)
def test_a_solver_has_its_order(name, order):
  """From T to T/4: the last step, to a singular point, is of order 1."""

  def error(n):
    table = float64(schedules.stride(S, n))
    x = jnp.linspace(-2, 2, 5)[:, None]
    end = n // 4
    x_end = run(step(name), table, x, times=range(n, end, -1))
    return float(jnp.abs(x_end - flow(table, x, n, end)).max())

  with jax.enable_x64(True):
    measured = orders(error, [32, 64, 128])
  # What is left of the next order at 32 steps is 1-2% of the order.
  np.testing.assert_allclose(measured, order, atol=0.05)


@pytest.mark.parametrize('name', FIXED)
def test_a_solver_goes_to_the_image_of_its_x_T(name):
  """All the way to 0, and each better than the one of lower order."""
  x = jnp.linspace(-2, 2, 5)[:, None]

  def error(name):
    table = schedules.stride(S, 32, spacings.quadratic)
    return jnp.abs(run(step(name), table, x) - flow(table, x, 32, 0)).max()

  assert error(name) < 0.06
  if name != 'ddim':
    assert error(name) < error('ddim') / 5


def test_inverting_ddim_and_going_back_is_the_identity_to_order_1():
  def there_and_back(n):
    table = float64(schedules.stride(S, n))
    x_0 = jnp.linspace(-1, 1, 5)[:, None]
    x_T = run(editing.invert, table, x_0, times=range(1, n + 1))
    there = jnp.abs(x_T - flow(table, x_0, 0, n)).max()
    back = jnp.abs(run(step('ddim'), table, x_T) - x_0).max()
    return float(there), float(back)

  with jax.enable_x64(True):
    error = np.array([there_and_back(n) for n in (256, 512)])
  # What is left of the next order is a few hundredths of the order.
  np.testing.assert_allclose(np.log2(error[0] / error[1]), 1, atol=0.1)
  assert error[-1].max() < 0.04


def test_a_step_inverted_with_its_own_eps_is_undone_exactly():
  """Where ε does not depend on x, there is no error at all."""
  table = schedules.stride(S, 7)

  def net(x_t, t):
    return jnp.ones_like(x_t) * jnp.sin(t.astype(jnp.float32))[:, None]

  @jax.jit
  def there_and_back(x):
    for solver, times in ((editing.invert, range(1, 8)), (step('ddim'), None)):
      denoiser = denoisers.Denoiser(table, net)
      x, *_ = samplers.sample(solver, denoiser, keys(5), x, times=times)
    return x

  x = there_and_back(jnp.linspace(-1, 1, 5)[:, None])
  # Through x_T, where a rounding of 6e-8 is divided by √ᾱ_T = 0.007.
  np.testing.assert_allclose(x[:, 0], jnp.linspace(-1, 1, 5), atol=1e-4)


@pytest.mark.parametrize('t', [1, 2, 50, 100])
def test_eta_1_is_the_posterior(t):
  table = schedules.linear(100, 1e-3, 0.2)
  x0, x_t = process.normal(keys(2), (3,))
  mean, variance = process.q_sigma(table, x0, x_t, jnp.array(t), 1.0)
  expected = process.q_posterior(table, x0, x_t, jnp.array(t))
  np.testing.assert_allclose(mean, expected[0], atol=2e-6)
  np.testing.assert_allclose(variance, expected[1], rtol=1e-6)


@pytest.mark.parametrize('clip', [True, False])
def test_ddim_of_eta_1_on_the_full_grid_is_ancestral_with_beta_tilde(clip):
  table = schedules.linear(100, 1e-3, 0.2)
  x_T = process.normal(keys(6, 1), (4,))
  ddim = step('ddim', eta=1.0, clip=clip)
  ancestral = step('ancestral', variance=variances.beta_tilde, clip=clip)
  one, other = (run(way, table, x_T) for way in (ddim, ancestral))
  # The same noise, and a hundred steps of roundings.
  np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_every_eta_leaves_q_of_x_t_as_it_is(eta):
  """Song et al. 2021, lemma 1: x_t ~ q(x_t | x_0) makes x_{t-1} ~ q."""
  table = schedules.stride(S, 9)
  t, x0 = jnp.arange(1, 10), 0.7
  mean_t = process.q_sample(table, x0, t, 0.0)
  mean, variance = process.q_sigma(table, x0, mean_t, t, eta)
  np.testing.assert_allclose(
    mean, process.q_sample(table, x0, t - 1, 0.0), rtol=1e-5
  )
  shifted, _ = process.q_sigma(table, x0, mean_t + 1, t, eta)
  total = (shifted - mean) ** 2 * table.one_minus_alpha_bar[t] + variance
  np.testing.assert_allclose(
    total, table.one_minus_alpha_bar[t - 1], rtol=1e-5, atol=1e-7
  )


def test_in_one_step_all_give_the_prediction_and_in_two_2m_is_ddim():
  """The last step is to x̂_0, and the first has nothing to look back at."""
  x = process.normal(keys(6, 1), (4,))
  one = schedules.stride(S, 1)
  eps_hat = gaussian.network(one, M, V)(x, jnp.ones(6, int))
  x0_hat = predictions.eps.to_x0(one, x, eps_hat, 1)
  for name in NAMES:
    # x̂_0 is x_T less its noise, divided by √ᾱ_T = 0.007.
    np.testing.assert_allclose(run(step(name), one, x), x0_hat, atol=1e-3)
  two, three = schedules.stride(S, 2), schedules.stride(S, 3)
  pairs = {'dpm_solver_pp_2m': 0.0, 'dpm_solver_pp_2m_sde': 1.0}
  for name, eta in pairs.items():
    ddim = step('ddim', eta=eta)
    np.testing.assert_allclose(
      run(step(name), two, x), run(ddim, two, x), atol=1e-6
    )
    gap = jnp.abs(run(step(name), three, x) - run(ddim, three, x))
    assert gap.max() > 1e-3


NOISY = [('ddim', {'eta': 1.0}), ('dpm_solver_pp_2m_sde', {})]


@pytest.mark.parametrize(('name', 'options'), NOISY)
def test_the_mean_of_a_noisy_sampler_is_exact_in_few_steps(
  name, options, monkeypatch
):
  """E[x_s | x_t] of q, since x̂_0 stays the same on the average.

  A chain without noise is the mean of an affine one with it.
  """
  zeros = lambda keys, shape: jnp.zeros((len(keys), *shape))  # noqa: E731
  monkeypatch.setattr(process, 'normal', zeros)
  with jax.enable_x64(True):
    table = float64(schedules.stride(S, 8))
    signal = jnp.sqrt(table.alpha_bar)
    variance = table.alpha_bar * V + table.one_minus_alpha_bar
    x = jnp.linspace(-2, 2, 5)[:, None]
    # Traced anew, so that no other test meets the noise of 0.
    times = range(5, 1, -1)
    x_1 = run.__wrapped__(step(name, **options), table, x, times)
    slope = signal[5] / signal[1] * variance[1] / variance[5]
    exact = signal[1] * M + slope * (x - signal[5] * M)
    # The tables are of float32.
    np.testing.assert_allclose(x_1, exact, atol=1e-6)


def test_looking_back_helps_the_sde_too():
  """Nearer to the data's variance than without, in as many steps."""
  n, N = 16, 100_000
  table = schedules.stride(S, n, spacings.quadratic)
  x = process.normal(keys(N, 1), (1,))
  plain, back = (
    abs(float(run(step(name, **options), table, x).var()) / V - 1)
    for name, options in NOISY
  )
  assert back < plain - 10 * np.sqrt(2 / N)


def test_a_step_looks_back_only_at_the_step_before():
  """After a jump back, or at the start of a row, it is of order 1."""
  table = schedules.stride(S, 8)
  x = process.normal(keys(3, 1), (4,))
  rows = editing.between(step('dpm_solver_pp_2m'), jnp.array([8, 5, 3]))
  x_0 = run(rows, table, x)
  for i, first in enumerate((8, 5, 3)):
    alone = run(
      step('dpm_solver_pp_2m'), table, x[i : i + 1], times=range(first, 0, -1)
    )
    np.testing.assert_allclose(x_0[i], alone[0], atol=1e-5)
  wrong = samplers.Previous(x, jnp.full(3, 4))
  own = table._replace(time=jnp.arange(9))
  denoiser = denoisers.Denoiser(own, gaussian.network(table, M, V))

  @jax.jit
  def both(t):
    found, _ = step('dpm_solver_pp_2m')(denoiser, keys(3), x, t, wrong)
    return found, step('ddim')(denoiser, keys(3), x, t)[0]

  for t in (1, 2, 4, 8):
    # Beside the weight 0 of what was before, other roundings of the same.
    np.testing.assert_allclose(*both(t), rtol=1e-6)
  found, ddim = both(3)
  assert jnp.all(jnp.abs(found - ddim) > 1e-3)


@pytest.mark.parametrize('name', NAMES)
def test_evaluations_are_what_the_network_is_asked(name):
  asked = []

  def net(x_t, t):
    jax.debug.callback(lambda t: asked.append(int(t[0])), t)
    return x_t

  table = schedules.stride(S, 6)
  denoiser = denoisers.Denoiser(table, net)
  draw = functools.partial(samplers.sample, getattr(samplers, name), denoiser)
  jax.block_until_ready(jax.jit(draw)(keys(2), jnp.ones((2, 3))))
  jax.effects_barrier()
  assert len(asked) == samplers.nfe(name, 6)
  assert set(asked) == set(np.asarray(table.time[1:]).tolist())


@pytest.mark.parametrize(
  'spacing', [getattr(spacings, name) for name in spacings.__all__]
)
@pytest.mark.parametrize('steps', [1, 2, 5, 10, 333, 999, 1000])
def test_spacings_rise_strictly_from_0_and_stay_within_T(spacing, steps):
  at = spacing(1000, steps)
  assert len(at) == steps + 1
  assert at[0] == 0
  assert np.all(np.diff(at) > 0)
  assert at[-1] <= 1000
  if spacing not in (spacings.leading, spacings.quad):
    assert at[-1] == 1000
  if steps == 1000:
    np.testing.assert_array_equal(at, np.arange(1001))


def test_spacings_are_those_of_the_papers():
  # Lin et al. 2023, table 1: trailing and leading, 10 of 1000.
  assert spacings.linear(1000, 10).tolist() == list(range(0, 1001, 100))
  leading = [0, *range(1, 1000, 100)]
  assert spacings.leading(1000, 10).tolist() == leading
  assert spacings.quadratic(1000, 10).tolist() == [10 * k**2 for k in range(11)]
  # DDIM's code: `int(s)` of np.linspace(0, np.sqrt(1000 * 0.8), 10) ** 2, from
  # 0, which is our 1.
  ddim = [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]
  assert spacings.quad(1000, 10).tolist() == [0, *(1 + t for t in ddim)]


def test_a_zero_terminal_snr_is_zero_and_leaves_the_first_step():
  for make in (schedules.linear, schedules.cosine, schedules.scaled_linear):
    before, s = make(1000), schedules.zero_terminal_snr(make(1000))
    assert s.alpha_bar[1000] == 0
    assert s.one_minus_alpha_bar[1000] == 1
    assert s.beta[1000] == 1
    np.testing.assert_allclose(s.alpha_bar[1], before.alpha_bar[1], rtol=1e-6)
    assert np.all(np.diff(s.alpha_bar) < 0)
    # Algorithm 1: √ᾱ shifted and scaled, so its differences keep their ratios.
    gaps = [np.diff(np.sqrt(np.asarray(x.alpha_bar[1:]))) for x in (s, before)]
    ratio = gaps[0] / gaps[1]
    # A difference of two roundings, 6e-8 of gaps of at least 1e-5.
    np.testing.assert_allclose(ratio, np.median(ratio), rtol=2e-2)
    for table in (s, schedules.stride(s, 7), schedules.stride(s, 1)):
      assert not any(np.any(np.isnan(x)) for x in table)
      assert np.argwhere(np.isinf(table.log_alpha_bar)).tolist() == [[table.T]]
      assert table.alpha_bar[table.T] == 0


@pytest.mark.parametrize(
  ('name', 'predict'), [*((name, 'v') for name in NAMES), ('ddim', 'x0')]
)
@pytest.mark.parametrize('steps', [1, 25])
def test_every_sampler_begins_at_a_zero_terminal_snr(name, predict, steps):
  """With x_T of noise alone, in float32; the data's mean is met."""
  full = schedules.zero_terminal_snr(S)
  table = schedules.stride(full, steps)
  kind = getattr(predictions, predict)

  def net(x_t, t):
    a = table.alpha_bar[t][:, None]
    n = table.one_minus_alpha_bar[t][:, None]
    x0 = M + jnp.sqrt(a) * V * (x_t - jnp.sqrt(a) * M) / (a * V + n)
    eps = (x_t - jnp.sqrt(a) * x0) / jnp.sqrt(n)
    return jax.vmap(kind.target, (None, 0, 0, 0))(table, x0, eps, t)

  own = table._replace(time=jnp.arange(steps + 1))
  denoiser = denoisers.Denoiser(own, net, kind)
  draw = functools.partial(samplers.sample, step(name), denoiser, keys(2000))
  x_0, *_ = jax.jit(draw)(process.normal(keys(2000, 1), (1,)))
  assert np.all(np.isfinite(x_0))
  assert abs(float(x_0.mean()) - M) < 0.07  # 5 standard errors of 2000
  if steps == 1:
    np.testing.assert_allclose(x_0, M, atol=1e-6)


def test_a_learned_range_is_of_the_jump_when_steps_are_jumps():
  table = schedules.stride(S, 10)
  for t in range(2, 11):
    low, middle, high = (
      variances.learned_range(table, jnp.array(raw), jnp.array(t))
      for raw in (-1.0, 0.0, 1.0)
    )
    jump = 1 - table.alpha_bar[t] / table.alpha_bar[t - 1]
    left = table.one_minus_alpha_bar[t - 1] / table.one_minus_alpha_bar[t]
    # A float32 1 - ratio.
    np.testing.assert_allclose(np.exp(high), jump, rtol=1e-4)
    np.testing.assert_allclose(np.exp(low), jump * left, rtol=1e-4)
    np.testing.assert_allclose(middle, (low + high) / 2, rtol=1e-6)


def test_learned_variances_are_used_on_a_strided_schedule():
  """A network that says the best variance of each jump makes the data's."""
  n, N = 8, 50_000
  table = schedules.stride(S, n)
  a, noise = table.alpha_bar, table.one_minus_alpha_bar
  # Of x_{t-1} given x_t, for Gaussian data (Bao et al. 2022, Analytic-DPM).
  left = (a * V + noise)[:-1]
  beta = table.beta[1:]
  exact = 1 / (1 / left + (1 - beta) / beta)
  small, large = table.beta_tilde[2:], beta[1:]
  v = jnp.log(exact[1:] / small) / jnp.log(large / small)
  assert np.all((v > 0) & (v < 1))
  raw = jnp.concatenate([jnp.zeros(2), 2 * v - 1])

  def net(x_t, t):
    eps = gaussian.network(table, M, V)(x_t, t)
    return jnp.concatenate([eps, raw[t][:, None]], axis=-1)

  own = table._replace(time=jnp.arange(n + 1))
  denoiser = denoisers.Denoiser(own, net)
  off = {}
  x = process.normal(keys(N, 1), (1,))
  # Down to x_1: the last step adds no noise.
  for name in ('learned_range', 'beta', 'beta_tilde'):
    way = step('ancestral', variance=getattr(variances, name))
    draw = functools.partial(samplers.sample, times=range(n, 1, -1))
    x_1, *_ = jax.jit(functools.partial(draw, way, denoiser))(keys(N), x)
    off[name] = abs(float(x_1.var() / left[1]) - 1)
  assert off['learned_range'] < 5 * np.sqrt(2 / N)
  assert min(off['beta'], off['beta_tilde']) > 10 * np.sqrt(2 / N)


def test_a_sampler_draws_from_a_run(tiny_run, tmp_path):
  args = ['--mode=sample', f'--workdir={tiny_run[0]}', '--num_samples=4']
  args += ['--config.sampler.name=heun', '--config.sampler.steps=5']
  main.run([*args, f'--output={tmp_path / "a.npz"}'])
  with np.load(tmp_path / 'a.npz') as file:
    assert file['images'].shape == (4, 8, 8, 1)
    assert np.ptp(file['images']) > 50


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'sampler.spacing': 'cubic'}, 'quadratic'),
    ({'schedule.zero_terminal_snr': 'true'}, 'predict to v or x0'),
    (
      {
        'schedule.zero_terminal_snr': 'true',
        'model.predict': 'v',
        'sampler.spacing': 'leading',
        'sampler.steps': '10',
      },
      'begin at T',
    ),
    ({'schedule.name': 'jsd'}, 'predict to v or x0'),
    (
      {
        'schedule.name': 'jsd',
        'model.predict': 'x0',
        'sampler.spacing': 'quad',
        'sampler.steps': '10',
      },
      'begin at T',
    ),
    ({'model.predict': 'mu', 'sampler.steps': '10'}, 'steps=1000'),
    (
      {
        'model.variance': 'learned',
        'loss.name': 'hybrid',
        'sampler.steps': '10',
      },
      'steps=1000',
    ),
  ],
)
def test_what_does_not_fit_is_a_line(changes, message):
  config = base.get_config()
  recipe.override(config, changes)
  with pytest.raises(errors.UserError, match=message):
    validate.check(config)


def test_what_does_fit_is_not_refused():
  for changes in (
    {'schedule.zero_terminal_snr': 'true', 'model.predict': 'v'},
    {
      'model.variance': 'learned_range',
      'loss.name': 'hybrid',
      'sampler.steps': '10',
    },
    {'sampler.name': 'ddim', 'sampler.eta': '1.0', 'sampler.steps': '10'},
  ):
    config = base.get_config()
    recipe.override(config, changes)
    validate.check(config)


@pytest.mark.slow
def test_the_table_of_a_run(tiny_run, tmp_path, monkeypatch, capsys):
  workdir = tmp_path / 'run'
  shutil.copytree(tiny_run[0], workdir)
  monkeypatch.setattr(few_steps, 'EVALUATIONS', (5,))
  ways = {'heun': few_steps.WAYS['heun']}
  monkeypatch.setattr(few_steps, 'WAYS', ways)
  main.run(['--mode=few_steps', f'--workdir={workdir}', '--num_samples=20'])
  (result,) = json.loads((workdir / 'few_steps.json').read_text())['tables']
  assert set(result['samplers']) == set(ways)
  heun = result['samplers']['heun']
  assert heun['evaluations'] == [5]
  assert heun['images_per_second'][0] > 0
  assert heun['frechet_distance'][0] > result['held_out']['frechet_distance']
  out = capsys.readouterr().out
  assert f'| heun | {heun["frechet_distance"][0]:.2f} |' in out
  with Image.open(workdir / 'few_steps.png') as file:
    assert file.width > 400


def test_the_ways_of_the_table_are_samplers_within_their_evaluations():
  found = []
  for variance in ('beta', 'learned_range', 'learned'):
    config = base.get_config()
    loss = 'simple' if variance == 'beta' else 'hybrid'
    recipe.override(config, {'model.variance': variance, 'loss.name': loss})
    found.append(set(few_steps.ways(config)))
    for way in few_steps.ways(config).values():
      for n in few_steps.budgets(way, 1000):
        c = few_steps.changed(config, way, n)
        validate.check(c)
        assert n - 1 <= few_steps.evaluations(c) <= n
  ancestral = {k for k in few_steps.WAYS if 'ancestral' in k}
  assert found[0] ^ found[1] == ancestral
  assert found[2] == set(few_steps.WAYS) - ancestral


@pytest.mark.parametrize(
  ('args', 'message'),
  [(['--num_samples=3'], 'needs at least 10'), (['--output=x'], '--output')],
)
def test_mistakes_with_the_table_are_a_line(args, message, tiny_run):
  with pytest.raises(errors.UserError, match=message):
    main.run(['--mode=few_steps', f'--workdir={tiny_run[0]}', *args])


def test_a_first_step_called_by_itself_looks_back_at_nothing():
  table = schedules.stride(S, 8)
  own = table._replace(time=jnp.arange(9))
  denoiser = denoisers.Denoiser(own, gaussian.network(table, M, V))
  x = process.normal(keys(3, 1), (4,))
  first, same = (
    getattr(samplers, name)(denoiser, keys(3), x, 5)[0]
    for name in ('dpm_solver_pp_2m', 'ddim')
  )
  np.testing.assert_array_equal(first, same)
