"""The figures that are curves. Each also prints a table.

`__all__` lists the figures.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import drawing
from ddpm_jax import plots
from ddpm_jax import sampling
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import losses
from ddpm_jax.diffusion import pixels
from ddpm_jax.evaluation import bound as bounds
from ddpm_jax.evaluation import small_data
from ddpm_jax.metrics import classifier as classifiers
from ddpm_jax.metrics import classifier_score
from ddpm_jax.metrics import distances
from ddpm_jax.study import common
from ddpm_jax.study import pictures
from ddpm_jax.study import two_term as two_term_form

__all__ = ['gradients', 'quality', 'rate_distortion', 'two_term']


def quality(trained: common.Run, count: int = 500) -> common.Drawn:
  """Sample quality by reverse step: figure 10, with the small-data score.

  Scores x̂_0 at twenty times of the chain with the features of a classifier of
  the data; see `metrics/classifier_score.py`.
  """
  common.need_two('quality', count)
  config, N = trained.config, trained.config.sampler.steps
  K = min(20, N)
  assert trained.workdir
  data, classifier = small_data.judge(config, trained.workdir)
  judged = functools.partial(classifiers.features_and_probabilities, classifier)
  draw = drawing.sampler(config, trained.engine, count, snapshots=K)
  _, seen = drawing.gather(draw(trained.params, seed=trained.seed))
  real, _ = judged(data['image'])
  times, frechet, sure = pictures.snapshot_times(config, K), [], []
  print('    t   Fréchet (classifier)   sure')
  for k, t in enumerate(times):
    features, probabilities = judged(seen[:, k])
    frechet += [
      distances.frechet(*distances.moments(real), *distances.moments(features))
    ]
    sure += [np.mean(probabilities.max(axis=1) > classifier_score.SURE)]
    print(f'{t:5}   {frechet[-1]:20.3f}   {sure[-1]:4.0%}')
  step = config.schedule.T + 1 - np.array(times)
  words = 'Fréchet distance, features of a classifier'
  low, share = (
    0.5 * min(frechet),
    f'share that is over {classifier_score.SURE:.0%} sure',
  )
  panels = [
    plots.Panel('reverse step', words, {'': (step, np.array(frechet))}, low),
    plots.Panel('reverse step', share, {'': (step, np.array(sure))}),
  ]
  return common.Drawn(plot=plots.plot(panels))


def rate_distortion(trained: common.Run, count: int = 64) -> common.Drawn:
  """Progressive lossy compression: figure 5, and its table in the appendix.

  The rate at t is the cost of sending x_t to a receiver with the model
  (Algorithms 3 and 4). The distortion is the error of x̂_0(x_t). Evaluates all
  t, on the first `count` images of the evaluation split.
  """
  config = trained.config.copy_and_resolve_references()
  config.evaluate.draws = 0
  source, split = dataset.source_to_evaluate(config, trained.workdir)
  count = min(count, len(source))
  bound = bounds.bound_of(
    config, trained.engine, trained.params, source, count, trained.seed
  )
  rate, rmse = progress(bound)
  print(table(rate, rmse, f'{count} images (split: {split})'))
  step, words = np.arange(1, len(rate) + 1), 'RMSE of 0..255'
  panels = [
    plots.Panel('reverse step', words, {'': (step, rmse)}),
    plots.Panel('reverse step', 'rate, bits/dim', {'': (step, rate)}),
    plots.Panel('rate, bits/dim', words, {'': (rate, rmse)}),
  ]
  return common.Drawn(plot=plots.plot(panels))


def progress(bound: likelihood.Bound) -> tuple[np.ndarray, np.ndarray]:
  """Rate (bits/dim) and RMSE (0..255), (T,), at reverse steps 1..T (t = T..1).

  Means over the images of a bound at all times. Sending x_T costs L_T, and then
  x_{s-1} costs L_{s-1}, so the rate at t is L_T + Σ_{s>t} L_{s-1}.
  """
  nats = np.asarray(bound.terms, np.float64).mean(0)[1:]  # L_1..L_{T-1}
  prior = np.asarray(bound.prior, np.float64).mean()
  rate = np.cumsum([prior, *nats[::-1]]) * likelihood.BITS
  mse = np.asarray(bound.mse, np.float64).mean(0)
  return rate, 127.5 * np.sqrt(mse[::-1])


def table(rate: np.ndarray, rmse: np.ndarray, of: str) -> str:
  """Formats rates and RMSE as in the paper's appendix."""
  lines = ['reverse step   rate (bits/dim)   RMSE (0..255)']
  for step in common.spread(len(rate), 10)[:0:-1]:
    lines += [f'{step:12}   {rate[step - 1]:15.5f}   {rmse[step - 1]:13.5f}']
  return '\n'.join([*lines, f'means over {of}, one x_t each at every t'])


def gradients(trained: common.Run, count: int = 256) -> common.Drawn:
  """Gradient variance by t of two losses with the same minimum.

  Compares `losses.two_noise` and `losses.one_noise` on the trained network. The
  variance is the trace of the covariance over `count` images and their noise.
  Its estimate, E_v Var(v·∇L) for directions v ~ N(0, I), needs forward-mode
  derivatives instead of a gradient for each example.
  """
  config, directions = trained.config, 8
  x0 = common.real(config, trained.seed, count)
  common.need_two('gradients', len(x0))
  module, schedule = build.network(config), build.schedule(config)
  times = np.array(common.spread(config.schedule.T, 20)[1:])
  times = np.unique([1, 2, *times])
  forms = losses.two_noise, losses.one_noise

  def fn(params: Any, rows: dict[str, jax.Array]) -> jax.Array:
    images, keys = pixels.to_float(rows['x0']), rows['keys']

    def values(params: Any, t: jax.Array) -> jax.Array:
      apply, t = build.applied(module, params), jnp.full(len(images), t)
      denoiser = build.denoiser(config, schedule, apply)
      every = [loss(denoiser, keys, images, t) for loss in forms]
      return jnp.stack(every, axis=1)

    def slopes(t: jax.Array, direction: jax.Array) -> jax.Array:
      leaves, tree = jax.tree.flatten(params)
      k = jax.random.split(jax.random.key(direction), len(leaves))
      v = [
        jax.random.normal(k_leaf, leaf.shape)
        for k_leaf, leaf in zip(k, leaves, strict=True)
      ]
      return jax.jvp(
        lambda p: values(p, t), (params,), (jax.tree.unflatten(tree, v),)
      )[1]

    grid = jnp.meshgrid(times, jnp.arange(directions), indexing='ij')
    each = jax.lax.map(lambda x: slopes(*x), tuple(x.ravel() for x in grid))
    each = each.reshape(len(times), directions, *each.shape[1:])
    return jnp.moveaxis(each, 2, 0)  # (B, times, directions, forms)

  keys, _ = sampling.noise(config, trained.seed, jnp.arange(len(x0)))
  each = trained.map(fn, {'x0': x0, 'keys': keys}).astype(np.float64)
  two, one = each.var(0, ddof=1).mean(1).T
  print(gradient_table(times, two, one))
  curves = {'two noises': (times, two), 'one noise': (times, one)}
  bottom = 0.5 * min(two.min(), one.min())
  panels = [
    plots.Panel('t', 'variance of the gradient', curves, bottom),
    plots.Panel('t', 'two noises / one', {'': (times, two / one)}, 0.5),
  ]
  return common.Drawn(plot=plots.plot(panels))


def gradient_table(times: np.ndarray, two: np.ndarray, one: np.ndarray) -> str:
  """Formats gradient variances at some times as text."""
  lines = ['variance of the gradient: t   two noises   one noise   ratio']
  for row in zip(times, two, one, two / one, strict=True):
    lines += ['{:27}   {:10.3g}   {:9.3g}   {:5.4g}'.format(*row)]
  return '\n'.join(lines)


def two_term(trained: common.Run, count: int = 8) -> common.Drawn:
  """Noise of the bound's estimators with two terms (eq. 3) and three (eq. 5).

  Each estimator is drawn 16 times for each of `count` images. Noise is the
  standard deviation over the draws of one image.
  """
  config, draws = trained.config.copy_and_resolve_references(), 16
  config.evaluate.draws = 0
  x0 = common.real(config, trained.seed, count)
  index = np.arange(len(x0) * draws, dtype=np.int32)
  rows = {'image': np.repeat(x0, draws, axis=0), 'index': index}
  forms = {
    'three terms': sampling.bound(config, trained.seed),
    'two terms': sampling.bound(config, trained.seed, two_term_form.bound),
  }
  drawn = {}
  for name, form in forms.items():
    bound = trained.map(form, rows)
    bits = likelihood.BITS * np.column_stack([bound.prior, bound.terms])
    drawn[name] = bits.reshape(len(x0), draws, -1).astype(np.float64)
  print(two_term_table(drawn))
  noise = {
    name: np.sqrt(x.var(1, ddof=1).mean(0))[1:] for name, x in drawn.items()
  }
  three, two = noise.values()
  t = np.arange(1, len(two) + 1)
  panels = [
    plots.Panel(
      't',
      'noise of a term, bits/dim',
      {name: (t, x) for name, x in noise.items()},
      0.5 * min(three.min(), two.min()),
    ),
    plots.Panel('t', 'two terms / three', {'': (t, two / three)}, 0.5),
  ]
  return common.Drawn(plot=plots.plot(panels))


def two_term_table(drawn: dict[str, np.ndarray]) -> str:
  """Formats terms, (images, draws, 1 + T) bits/dim with L_T first, as text."""
  lines = ['                 bound   noise: all t   one t, T times']
  for name, x in drawn.items():
    total, terms = x.sum(2), x[..., 1:]
    whole = np.sqrt(total.var(1, ddof=1).mean())
    one = terms.shape[2] * np.sqrt(terms.var((1, 2)).mean())
    error = whole / math.sqrt(total.size)
    lines += [
      f'{name:11} {total.mean():.4f} ± {error:.4f}  {whole:9.4f} {one:16.4f}'
    ]
  n, draws = total.shape
  return '\n'.join([*lines, f'bits/dim; {n} images, {draws} draws of each'])
