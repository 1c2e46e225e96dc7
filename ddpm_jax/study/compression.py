"""The figure that compares the codec with its theory, JPEG and WebP.

`__all__` lists the figures.
"""

import pathlib

import jax
import numpy as np

from ddpm_jax import inputs
from ddpm_jax import plots
from ddpm_jax.compression import transmission
from ddpm_jax.data import store
from ddpm_jax.evaluation import bound as bounds
from ddpm_jax.storage import images
from ddpm_jax.study import common
from ddpm_jax.study import curves

__all__ = ['codec']


def codec(
  trained: common.Run, count: int = 32, path: pathlib.Path | None = None
) -> common.Drawn:
  """Rate and distortion of the codec on real images.

  Plots the code length and ΣKL by steps received; and RMSE by bits/dim for the
  codec, the bound with all T steps, JPEG and WebP, with and without headers.

  Uses images of the evaluation split, or those of `path`.
  """
  config = trained.config.copy_and_resolve_references()
  config.evaluate.draws = 0
  if path is None:
    x0 = common.real(config, trained.seed, count)
  else:
    x0 = inputs.read(path, config)
    x0 = x0[common.some(len(x0), trained.seed, count)]
  params = jax.device_get(trained.params)
  sent = transmission.send(config, params, x0, trained.seed)
  table = transmission.table(sent, x0)
  _, shown, seconds = transmission.images_of(config, params, sent.data)
  same = 'equal' if np.array_equal(shown, sent.shown[-1]) else 'NOT equal'
  print(f'{table}\n{seconds / len(x0):.3f} to decode, {same} to the sender')
  source = store.from_arrays(x0, np.full(len(x0), -1, np.int32))
  bound = bounds.bound_of(
    config, trained.engine, trained.params, source, len(x0), trained.seed
  )
  spent, theory = transmission.spent(sent, x0), curves.progress(bound)
  around = 8 * sent.around / x0.size
  lines = {
    'codec, whole file': (spent.code + around, spent.rmse),
    'codec, without header': (spent.code, spent.rmse),
    'ΣKL of its steps': (spent.kl, spent.rmse),
    f'bound, all {config.schedule.T} steps': theory,
  }
  for form in ('JPEG', 'WEBP'):
    whole, inner, rmse = by_quality(x0, form)
    print(quality_table(form, whole, inner, rmse))
    lines[f'{form}, whole file'] = whole, rmse
    lines[f'{form}, without header'] = inner, rmse
  most = max(spent.code[-1] + around, 1)
  near = {
    name: (x[x <= 2 * most], np.asarray(y)[x <= 2 * most])
    for name, (x, y) in lines.items()
  }
  steps = np.arange(len(spent.kl))
  both = {'code': (steps, spent.code), 'ΣKL': (steps, spent.kl)}
  panels = [
    plots.Panel('bits/dim', 'RMSE of 0..255', near),
    plots.Panel('steps received', 'code (above) and ΣKL, bits/dim', both),
  ]
  return common.Drawn(plot=plots.plot(panels))


def by_quality(
  x0: np.ndarray, form: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Bits/dim with and without headers, and RMSE, for a range of qualities."""
  rows = []
  for quality in (1, 5, 10, 20, 30, 50, 70, 80, 90, 95, 100):
    every = [images.encode(x, form, quality) for x in x0]
    shown, whole, inner = zip(*every, strict=True)
    mse = np.square(np.stack(shown).astype(np.float32) - x0).mean()
    bits = [8 * sum(n) / x0.size for n in (whole, inner)]
    rows.append((*bits, np.sqrt(mse)))
  whole, inner, rmse = np.array(rows).T
  return whole, inner, rmse


def quality_table(
  form: str, whole: np.ndarray, inner: np.ndarray, rmse: np.ndarray
) -> str:
  """Formats the result of `by_quality` as text."""
  rows = [f'{form}: whole file (bits/dim)   without header   RMSE (0..255)']
  for row in zip(whole, inner, rmse, strict=True):
    rows += ['{:27.3f}   {:14.3f}   {:13.3f}'.format(*row)]
  return '\n'.join(rows)
