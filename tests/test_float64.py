"""Every schedule, prediction, loss and sampler against float64 in NumPy.

At T = 1 and 2, and at noise levels where ᾱ_t is far below what float32 holds
(1e-439 for `sqrt` with T = 10,000).
"""

import functools

import jax
import jax.numpy as jnp
import jitted
import numpy as np
import pytest
from scipy import stats

from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import losses
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import variances

NAMES = sorted(schedules.__all__)
TIMES = (1, 2, 1000, 10_000)
KINDS = ('eps', 'x0', 'v', 'mu')
B, D = 5, 6  # examples, one for each time that is looked at; their dimensions


def times(T):
  """B of them: both ends, and between."""
  return np.clip([1, 2, (T + 1) // 2, T - 1, T], 1, T)


class Exact:
  """The tables of a schedule in float64; x_t, x_0, ε and t are arrays."""

  def __init__(self, schedule):
    beta = np.asarray(schedule.beta, np.float64)
    with np.errstate(divide='ignore'):
      self.log_alpha_bar = np.cumsum(np.log1p(-beta))
    self.beta, self.T = beta, len(beta) - 1
    self.signal = np.exp(self.log_alpha_bar / 2)
    self.var = -np.expm1(self.log_alpha_bar)
    self.noise = np.sqrt(self.var)
    self.tilde = np.append(0, beta[1:] * self.var[:-1] / self.var[1:])
    with np.errstate(divide='ignore', over='ignore'):
      self.log_snr = self.log_alpha_bar - np.log(self.var)

  def q(self, x0, eps, t):
    return self.signal[t] * x0 + self.noise[t] * eps

  def posterior(self, x0, x_t, t):
    of_x0 = self.signal[t - 1] * self.beta[t] / self.var[t]
    of_x_t = np.sqrt(1 - self.beta[t]) * self.var[t - 1] / self.var[t]
    return of_x0 * x0 + of_x_t * x_t

  def target(self, kind, x0, eps, t):
    return {
      'eps': eps,
      'x0': x0,
      'v': self.signal[t] * eps - self.noise[t] * x0,
      'mu': self.posterior(x0, self.q(x0, eps, t), t),
    }[kind]

  def x0_hat(self, kind, out, x_t, t):
    if kind == 'x0':
      return out
    if kind == 'v':
      return self.signal[t] * x_t - self.noise[t] * out
    if kind == 'eps':
      return (x_t - self.noise[t] * out) / self.signal[t]
    of_x0 = self.signal[t - 1] * self.beta[t] / self.var[t]
    return (out - self.posterior(0, x_t, t)) / of_x0

  def mean(self, kind, out, x_t, t, clip):
    if kind == 'mu':
      return out
    if kind == 'eps' and not clip:
      return self.eq_11(out, x_t, t)
    x0 = self.x0_hat(kind, out, x_t, t)
    return self.posterior(np.clip(x0, -1, 1) if clip else x0, x_t, t)

  def eq_11(self, eps, x_t, t):
    shrunk = x_t - self.beta[t] / self.noise[t] * eps
    return shrunk / np.sqrt(1 - self.beta[t])

  def log_variance(self, name, t):
    first = self.tilde[2] if self.T > 1 else self.beta[1]
    table = {'beta': self.beta, 'beta_tilde': self.tilde}[name]
    return np.log(np.where(t > 1, table[t], first))

  def jump(self, x0, x_t, t, eta=0.0, z=0.0):
    eps = (x_t - self.signal[t] * x0) / self.noise[t]
    sigma2 = eta**2 * self.tilde[t]
    rest = np.sqrt(np.maximum(self.var[t - 1] - sigma2, 0))
    return self.signal[t - 1] * x0 + rest * eps + np.sqrt(sigma2) * z


@functools.cache
def schedule(name, T):
  return getattr(schedules, name)(T=T)


def kinds(s):
  """Those that a schedule can do with: ε does not tell x_0 at ᾱ_T = 0."""
  return KINDS[1:] if schedules.ends_in_noise(s) else KINDS


def net(x_t, t):
  """Some network: neither right nor constant."""
  scale = 1 + 0.1 * jnp.cos(1.0 * t).reshape(-1, *(1,) * (x_t.ndim - 1))
  return scale * jnp.tanh(x_t + 0.3)


def net64(x_t, t):
  return (1 + 0.1 * np.cos(t)) * np.tanh(x_t + 0.3)


def wide(x_t, t):
  """The same, with a variance beside it."""
  return jnp.concatenate([net(x_t, t), jnp.sin(x_t)], axis=-1)


def keys():
  return jax.random.split(jax.random.key(3), B)


def grays():
  x = jax.random.randint(jax.random.key(4), (B, D), 0, 256)
  return np.asarray(x) / 127.5 - 1


def near(got, want, what, rtol=3e-4, atol=3e-5):
  got = np.asarray(got, np.float64)
  assert np.all(np.isfinite(got)), what
  np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=what)


@jax.jit
def forward(s, x0, eps, t, low, high):
  """x_t; x_t of each x_s with s in `low`; the targets of all predictions."""
  targets = {
    kind: jax.vmap(getattr(predictions, kind).target, (None, 0, 0, 0))(
      s, x0, eps, t
    )
    for kind in KINDS
  }
  between = jax.vmap(process.q_between, (None, None, 0, 0, None))
  return (
    process.q_sample(s, x0, t, eps),
    between(s, x0, low, high, eps),
    targets,
  )


@jax.jit
def reverse_steps(s, outs, x_t, t):
  """Mean, log variance and x̂_0 of every prediction, clipped and not."""
  return {
    (kind, clip): denoisers.p_mean_variance(
      denoisers.Denoiser(
        s, lambda x_t, t: outs, getattr(predictions, kind), clip=clip
      ),
      *(x_t, t),
    )
    for kind in KINDS
    for clip in (True, False)
  }


@pytest.mark.parametrize('T', TIMES)
@pytest.mark.parametrize('name', NAMES)
def test_forward_and_reverse_step(name, T):
  s, t = schedule(name, T), times(T)
  e, at = Exact(s), t[:, None]
  x0, eps = grays(), np.asarray(jax.random.normal(jax.random.key(5), (B, D)))
  low = np.repeat([[0], [1], [T // 2], [T - 1], [T]], B, axis=1)
  high = np.maximum(t, low)
  sampled, between, targets = forward(s, jnp.float32(x0), eps, t, low, high)
  near(sampled, e.q(x0, eps, at), 'q_sample')
  with np.errstate(invalid='ignore'):  # -∞ less itself
    kept = e.log_alpha_bar[high] - e.log_alpha_bar[low]
  kept = np.where(high == low, 0, kept)[..., None]
  want = np.exp(kept / 2) * x0 + np.sqrt(-np.expm1(kept)) * eps
  near(between, want, 'q_between')
  x_t = np.float32(e.q(x0, eps, at))
  out = np.asarray(net(x_t, t))
  reverse = reverse_steps(s, out, x_t, t)
  for kind in kinds(s):
    near(targets[kind], e.target(kind, x0, eps, at), kind)
    for clip in (True, False):
      mean, log_var, x0_hat = reverse[kind, clip]
      near(mean, e.mean(kind, out, x_t, at, clip), f'{kind} {clip}')
      near(log_var[:, 0], e.log_variance('beta', t), kind)
      assert np.all(np.isfinite(x0_hat))
      if clip:
        want = np.clip(e.x0_hat(kind, out, x_t, at), -1, 1)
        near(x0_hat, want, kind, atol=2e-3)


LOSSES = [
  (name, kind)
  for name in ('simple', 'vlb', 'two_noise', 'one_noise', 'x_prev')
  for kind in KINDS
]
# μ̃ is refused for it, by `validate.loss`.
LOSSES += [('min_snr', kind) for kind in ('eps', 'x0', 'v')]


def model(s, kind, network=net, **fields):
  return denoisers.Denoiser(s, network, getattr(predictions, kind), **fields)


@jax.jit
def all_losses(s, x0, t):
  found = {
    (name, kind): getattr(losses, name)(model(s, kind), keys(), x0, t)
    for name, kind in LOSSES
  }
  learned = denoisers.Denoiser(s, wide, variance=variances.learned_range)
  found['hybrid', 'eps'] = losses.hybrid(learned, keys(), x0, t)
  return found


def mean_square(x):
  return np.square(x).mean(1)


def bits(e, x0, mean, log_var, x_t, t):
  """L_{t-1}, in bits a dimension, of p's mean and log variance."""
  true, log_true = e.posterior(x0, x_t, t), e.log_variance('beta_tilde', t)
  ratio = log_true - log_var
  kl = np.expm1(ratio) - ratio + (true - mean) ** 2 * np.exp(-log_var)
  a, b = ((x0 + side / 255 - mean) * np.exp(-log_var / 2) for side in (-1, 1))
  a, b = np.where(a + b > 0, -b, a), np.where(a + b > 0, -a, b)
  low, high = stats.norm.logcdf(a), stats.norm.logcdf(b)
  between = high + np.log1p(-np.exp(low - high))
  z = (x0 - mean) * np.exp(-log_var / 2)
  edge = np.exp(-log_var / 2) / 255
  log_p = np.where(x0 < -0.999, stats.norm.logcdf(z + edge), between)
  log_p = np.where(x0 > 0.999, stats.norm.logcdf(edge - z), log_p)
  return np.where(t > 1, kl / 2, -log_p).mean(1) / np.log(2)


def expected_loss(e, name, kind, x0, t):
  at, noise = t[:, None], functools.partial(process.normal, shape=(D,))
  if name in ('two_noise', 'x_prev'):
    first, second = jax.vmap(jax.random.split, out_axes=1)(keys())
    previous = e.q(x0, np.float64(noise(first)), at - 1)
    eps = np.float64(noise(second))
    kept, added = np.sqrt(1 - e.beta[at]), np.sqrt(e.beta[at])
    x_t = kept * previous + added * eps
  else:
    eps = np.float64(noise(keys()))
    x_t = e.q(x0, eps, at)
  out = net64(x_t, at)
  target = e.target(kind, x0, eps, at)
  mean = e.mean(kind, out, x_t, at, clip=False)
  share = e.beta[at] / e.var[at]
  if kind == 'eps':
    eps_hat = out
  else:
    rest = x_t - np.sqrt(1 - e.beta[at]) * mean
    eps_hat = rest * e.noise[at] / e.beta[at]
  snr = e.log_snr[t]
  gain = {'eps': -snr, 'x0': 0, 'v': np.log(e.var[t])}.get(kind)
  if name == 'simple':
    return mean_square(target - out)
  if name == 'min_snr':
    weight = np.exp(np.minimum(snr, np.log(5)) + gain)
    return weight * mean_square(target - out)
  if name == 'two_noise':
    return mean_square(eps - np.sqrt(share) * eps_hat)
  if name == 'one_noise':
    return share[:, 0] * mean_square(eps - eps_hat)
  if name == 'x_prev':
    return mean_square(previous - mean)
  if name == 'vlb':
    return bits(e, x0, mean, e.log_variance('beta', at), x_t, at)
  v = (np.sin(x_t) + 1) / 2
  log_var = v * np.log(e.beta[at])
  log_var += (1 - v) * e.log_variance('beta_tilde', at)
  bound = e.T * bits(e, x0, mean, log_var, x_t, at)
  return mean_square(target - out) + 0.001 * bound


@pytest.mark.parametrize('T', TIMES)
@pytest.mark.parametrize('name', NAMES)
def test_losses(name, T):
  s, t, x0 = schedule(name, T), times(T), grays()
  e = Exact(s)
  found = all_losses(s, jnp.float32(x0), t)
  for (loss, kind), got in found.items():
    if kind in kinds(s):
      want = expected_loss(e, loss, kind, x0, t)
      near(got, want, f'{loss} {kind}', rtol=2e-3)


STEPS = {
  'ancestral': samplers.ancestral,
  'ancestral, beta_tilde': jitted.reading(
    samplers.ancestral, variance=variances.beta_tilde
  ),
  'greedy': samplers.greedy,
  'ddim': samplers.ddim,
  'ddim, eta': functools.partial(samplers.ddim, eta=0.5),
  'dpm_solver_pp_2m': samplers.dpm_solver_pp_2m,
  'dpm_solver_pp_2m_sde': samplers.dpm_solver_pp_2m_sde,
  'heun': samplers.heun,
}


def test_these_are_all_the_samplers():
  base = {name.split(',')[0] for name in STEPS}
  assert base == set(samplers.__all__)


@jax.jit
def all_steps(s, x_t, t, x0_before):
  # At T there was no step before.
  t_before = jnp.full(B, jnp.where(t < s.T, t + 1, 0))
  previous = samplers.Previous(x0_before, t_before)
  return {
    (name, kind): step(model(s, kind), keys(), x_t, t, previous)[0]
    for name, step in STEPS.items()
    for kind in KINDS
  }


def expected_step(e, name, kind, x_t, t, x0_before, z):
  out = net64(x_t, t)
  x0 = np.clip(e.x0_hat(kind, out, x_t, t), -1, 1)
  mean = e.mean(kind, out, x_t, t, clip=True)
  if name == 'greedy':
    return mean
  if name.startswith('ancestral'):
    variance = 'beta_tilde' if 'tilde' in name else 'beta'
    sigma = np.exp(e.log_variance(variance, t) / 2)
    return mean + (t > 1) * sigma * z
  if name.startswith('ddim'):
    return e.jump(x0, x_t, t, 0.5 * ('eta' in name), z)
  if name == 'heun':
    euler = e.jump(x0, x_t, t)
    if t == 1:
      return euler
    second = net64(euler, t - 1)
    second = np.clip(e.x0_hat(kind, second, euler, t - 1), -1, 1)
    return e.jump((x0 + second) / 2, x_t, t)
  middle = x0
  if 1 < t < e.T:
    h, h_before = -np.diff(e.log_snr)[[t - 1, t]]
    middle = x0 + h / (2 * h_before) * (x0 - x0_before)
  return e.jump(middle, x_t, t, 1.0 * ('sde' in name), z)


@pytest.mark.parametrize('T', TIMES)
@pytest.mark.parametrize('name', NAMES)
def test_sampler_steps(name, T):
  s = schedule(name, T)
  e, z = Exact(s), np.float64(process.normal(keys(), (D,)))
  x_t = np.asarray(jax.random.normal(jax.random.key(6), (B, D)))
  x0_before = 0.7 * grays()
  for t in sorted(set(times(T).tolist())):
    steps = all_steps(s, x_t, jnp.int32(t), jnp.float32(x0_before))
    for (step, kind), got in steps.items():
      if kind in kinds(s):
        want = expected_step(e, step, kind, x_t, t, x0_before, z)
        near(got, want, f'{step} {kind} at t = {t}', rtol=1e-3, atol=1e-3)


def optimum(s, mean=0.2, variance=0.04):
  """E[v | x_t] for x_0 ~ N(mean, variance); v fits all schedules."""

  def network(x_t, t):
    signal = s.sqrt_alpha_bar[t][:, None]
    var = s.one_minus_alpha_bar[t][:, None]
    total = signal**2 * variance + var
    x0 = mean + signal * variance / total * (x_t - signal * mean)
    eps = jnp.sqrt(var) / total * (x_t - signal * mean)
    return signal * eps - jnp.sqrt(var) * x0

  return network


@jax.jit
def all_chains(s, x_T, keys):
  return {
    name: samplers.sample(step, model(s, 'v', optimum(s)), keys, x_T)[0]
    for name, step in STEPS.items()
  }


CHAINS = [(name, T) for name in NAMES for T in (1, 2, 1000)]
CHAINS += [('sqrt', 10_000)]


@pytest.mark.parametrize(('name', 'T'), CHAINS)
def test_whole_chains_draw_the_data(name, T):
  """x_0 ~ N(0.2, 0.2²), of which 1e-4 lies outside of [-1, 1]."""
  n, s = 64, schedule(name, T)
  e = Exact(s)
  x_T = jax.random.normal(jax.random.key(7), (n, D))
  keys = jax.random.split(jax.random.key(8), n)
  for step, x_0 in all_chains(s, x_T, keys).items():
    assert np.all(np.isfinite(x_0)), step
    # 384 draws: five standard errors. The variance is right where the last
    # steps are small, and where there is noise.
    if e.signal[-1] < 0.02:
      assert abs(x_0.mean() - 0.2) < 5 * 0.2 / np.sqrt(n * D), step
      if e.beta[1] < 1e-3 and step != 'greedy':
        assert x_0.std() == pytest.approx(0.2, rel=5 / np.sqrt(2 * n * D)), step


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('T', [1, 1000, 10_000])
def test_a_network_in_bfloat16_has_its_mean_in_float32(kind, T):
  s, t = schedules.sqrt(T), times(T)
  x_t = jax.random.normal(jax.random.key(9), (B, D))
  out = net(x_t, t).astype(jnp.bfloat16)
  mean, _, x0_hat = reverse_steps(s, out, x_t, t)[kind, True]
  assert mean.dtype == x0_hat.dtype == jnp.float32
  want = Exact(s).mean(kind, np.float64(out), x_t, t[:, None], clip=True)
  near(mean, want, kind)


@pytest.mark.parametrize(
  ('variance', 'draws'), [('beta', 5), ('beta_tilde', 0)]
)
@pytest.mark.parametrize('T', [1, 2, 10])
def test_the_bound(T, variance, draws):
  """L_T + Σ L_t + L_0, all of it written again in NumPy."""
  s, x0 = schedules.linear(T, beta_T=0.3), grays()
  e = Exact(s)
  denoiser = model(s, 'eps', variance=getattr(variances, variance))
  bound = functools.partial(likelihood.bound, denoiser, keys(), draws=draws)
  got = jax.jit(bound)(jnp.float32(x0))
  rows = got.t.shape[1]
  assert rows == (1 + draws if draws and T > 1 else T)
  assert np.all(got.t[:, 0] == 1)
  wanted = []
  for row in range(rows):
    t = np.asarray(got.t)[:, [row]]
    row_keys = jax.vmap(jax.random.fold_in, (0, None))(keys(), row)
    eps = np.float64(process.normal(row_keys, (D,)))
    x_t = e.q(x0, eps, t)
    mean = e.mean('eps', net64(x_t, t), x_t, t, clip=True)
    want = bits(e, x0, mean, e.log_variance(variance, t), x_t, t)
    near(got.terms[:, row] / np.log(2), want, f'row {row}', rtol=1e-3)
    wanted.append(want)
  prior = e.signal[-1] ** 2 * np.square(x0).mean(1)
  prior += e.var[-1] - 1 - np.log(e.var[-1])
  near(got.prior, prior / 2, 'L_T')
  _, between, last = likelihood.totals(got, T)
  # Of the T - 1 terms between there are all, or draws to take the mean of.
  L_0, *others = np.asarray(wanted)
  near(last, L_0 * np.log(2), 'L_0', rtol=1e-3)
  mean = np.mean(others, axis=0) if others else np.zeros_like(L_0)
  near(between, (T - 1) * mean * np.log(2), 'Σ L_t', rtol=1e-3)
