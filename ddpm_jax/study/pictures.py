"""The figures that are grids of images: 2, 6 to 9, and the appendix's.

`__all__` lists the figures.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import drawing
from ddpm_jax import errors
from ddpm_jax import plots
from ddpm_jax import sampling
from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import editing
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import pixels
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules as tables
from ddpm_jax.storage import logs
from ddpm_jax.study import common

__all__ = [
  'forward',
  'generation',
  'interpolation',
  'nearest',
  'progressive',
  'schedules',
  'shared',
]


def forward(trained: common.Run, count: int = 6) -> common.Drawn:
  """Images becoming noise under q: the chain of figure 2, from right to left.

  Each image has the same ε for all t, so that the animation is continuous.
  """
  config, table = trained.config, build.schedule(trained.config)
  x0 = common.real(config, trained.seed, count)
  _, eps = sampling.noise(config, trained.seed, jnp.arange(len(x0)))
  film = np.array(common.spread(table.T, 50))
  x_t = common.noised(table, x0, film, eps)
  shown = common.spread(len(film) - 1, 10)
  heads = [f't = {t}' for t in film]
  return common.Drawn(
    x_t[:, shown],
    [heads[k] for k in shown],
    frames=x_t.swapaxes(0, 1)[:, None],
    heads=heads,
  )


def every_schedule(config: ConfigDict) -> dict[str, tables.Schedule]:
  """All schedules for a recipe by name; equal ones have one joined name."""
  names: dict[bytes, list[str]] = {}
  known: dict[bytes, tables.Schedule] = {}
  for name in tables.__all__:
    c = config.copy_and_resolve_references()
    c.schedule.name = name
    table = build.schedule(c)
    same = np.asarray(table.alpha_bar).tobytes()
    names.setdefault(same, []).append(name)
    known[same] = table
  return {', '.join(names[same]): table for same, table in known.items()}


def schedules(trained: common.Run) -> common.Drawn:
  """ᾱ_t and SNR of all schedules, and one image under each; not in the paper.

  The run's own schedule is the thick line and the marked row.
  """
  config, every = trained.config, every_schedule(trained.config)
  own = next(k for k in every if config.schedule.name in k.split(', '))
  t = np.arange(1, config.schedule.T + 1)
  signal, snr = {}, {}
  for name, s in every.items():
    signal[name] = t, np.asarray(s.alpha_bar)[1:]
    snr[name] = t, np.exp(np.asarray(tables.log_snr(s, t)))
  print(schedule_table(every))
  panels = [
    plots.Panel('t', r'$\bar\alpha_t$', signal),
    plots.Panel(
      't', r'SNR, $\bar\alpha_t / (1 - \bar\alpha_t)$', snr, bottom=1e-6
    ),
  ]
  x0 = common.real(config, trained.seed, 1)
  _, eps = sampling.noise(config, trained.seed, jnp.arange(1))
  times = np.array(common.spread(config.schedule.T, 10))
  strips = [common.noised(s, x0, times, eps)[0] for s in every.values()]
  return common.Drawn(
    np.stack(strips),
    [f't = {t}' for t in times],
    [f'{"▸ " if name == own else ""}{name}' for name in every],
    plot=plots.plot(panels, own),
  )


def schedule_table(every: dict[str, tables.Schedule]) -> str:
  """Formats how much of x_0 is left in x_T as text."""
  width = max(len(name) for name in every)
  lines = [f'{"schedule":{width}}   log ᾱ_T   KL(q(x_T | x_0) ‖ N(0, I))']
  for name, s in every.items():
    bits = likelihood.prior(s, jnp.ones((1, 1)))[0] * likelihood.BITS
    lines += [
      f'{name:{width}}   {s.log_alpha_bar[-1]:7.2f}   {bits:.2g} bits/dim'
    ]
  return '\n'.join(lines)


def progressive(trained: common.Run, count: int = 8) -> common.Drawn:
  """x̂_0 of samples at ten times of the chain: figure 6."""
  config, N = trained.config, trained.config.sampler.steps
  K = min(50, N)
  draw = drawing.sampler(config, trained.engine, count, snapshots=K)
  _, seen = drawing.gather(draw(trained.params, seed=trained.seed))
  heads = [f't = {t}' for t in snapshot_times(config, K)]
  # The last snapshot is the sample itself.
  shown = [round(K * k / min(K, 10)) - 1 for k in range(1, min(K, 10) + 1)]
  return common.Drawn(
    seen[:, shown],
    [heads[k] for k in shown],
    frames=seen.swapaxes(0, 1)[:, None],
    heads=heads,
  )


def snapshot_times(config: ConfigDict, K: int) -> list[int]:
  """The times of K snapshots of `samplers.sample`.

  Found by sampling with a step that returns the time as its prediction.
  """
  table = build.sampler(config).schedule

  def clock(denoiser: Any, keys: Any, x: Any, t: Any, previous: Any) -> Any:
    return x, jnp.full_like(x, denoiser.schedule.time[t])

  keys = jax.random.split(jax.random.key(0), 1)
  none = denoisers.Denoiser(table, lambda x, t: x)
  _, seen, _ = samplers.sample(clock, none, keys, jnp.zeros(1), snapshots=K)
  return np.asarray(seen)[:, 0].astype(int).tolist()


def shared(trained: common.Run, count: int = 7) -> common.Drawn:
  """Samples that share x_t, for several t: figure 7.

  One chain runs to x_t, and `count` chains with different noise continue from
  there. The smaller t, the more the samples have in common.
  """
  config, seed = trained.config, trained.seed
  p = build.sampler(config)
  forks = np.array(common.spread(p.schedule.T, 4)[::-1])

  def fn(params: Any, rows: dict[str, jax.Array]) -> sampling.Drawn:
    t, first = rows['t'], rows['chain']
    denoiser = p.denoiser(params)
    keys, x_T = sampling.noise(config, seed, first)
    to_x_t = editing.between(p.step, p.schedule.T, t + 1)
    x_t, _, bad_t = samplers.sample(to_x_t, denoiser, keys, x_T)
    others = first[:, None] + 1 + jnp.arange(count)[None]
    keys, _ = sampling.noise(config, seed, others.ravel())
    from_x_t = editing.between(p.step, jnp.repeat(t, count))
    x_0, _, bad = samplers.sample(
      from_x_t, denoiser, keys, jnp.repeat(x_t, count, 0)
    )
    x_0 = x_0.reshape(-1, count, *x_t.shape[1:])
    tiles = pixels.to_uint8(jnp.concatenate([x_t[:, None], x_0], axis=1))
    bad_t = jnp.maximum(bad_t, bad.reshape(-1, count).max(1))
    return sampling.Drawn(tiles, None, bad_t)

  tiles = trained.map(fn, {'t': forks, 'chain': np.zeros_like(forks)})
  times = np.asarray(p.schedule.time)[forks]
  titles = ['$x_t$', *[f'{k + 1}' for k in range(count)]]
  return common.Drawn(tiles, titles, [f't = {t}' for t in times])


def interpolation(trained: common.Run, count: int = 1) -> common.Drawn:
  """Two images mixed at x_t and denoised, for several t: figures 8 and 9.

  Both images of each of `count` pairs have the same ε (see
  `editing.interpolate`), and all chains of a pair the same noise. λ = 0 and 1
  reconstruct the images. At t = T almost nothing of them is left in x_T, so all
  images of a row are nearly the same.
  """
  config, seed = trained.config, trained.seed
  p = build.sampler(config)
  a, b = unlike(common.real(config, seed, 16 * count), count)
  T = p.schedule.T
  times = np.array(sorted({math.ceil(T * k / 8) for k in (1, 2, 4, 6, 8)}))
  weights = np.linspace(0, 1, 11, dtype=np.float32)
  shape = count, len(times), len(weights)
  pair, t, weight = np.broadcast_arrays(
    np.arange(count)[:, None, None], times[:, None], weights
  )

  def fn(params: Any, rows: dict[str, jax.Array]) -> sampling.Drawn:
    keys, eps = sampling.noise(config, seed, rows['pair'])
    x_t = jax.vmap(editing.interpolate, (None, 0, 0, 0, 0, 0))(
      p.schedule,
      *(pixels.to_float(rows['a']), pixels.to_float(rows['b'])),
      *(rows['t'], rows['weight'], eps),
    )
    step = editing.between(p.step, rows['t'])
    sampled = samplers.sample(step, p.denoiser(params), keys, x_t)
    return sampling.drawn(config, sampled)

  rows = {'pair': pair.ravel(), 't': t.ravel(), 'weight': weight.ravel()}
  rows |= {'a': a[rows['pair']], 'b': b[rows['pair']]}
  mixed = trained.map(fn, rows).reshape(*shape, *a.shape[1:])
  sources = [
    np.broadcast_to(x[:, None, None], (*shape[:2], 1, *x.shape[1:]))
    for x in (a, b)
  ]
  tiles = np.concatenate([sources[0], mixed, sources[1]], axis=2)
  inner = [f'λ = {weight:.1f}' for weight in weights[1:-1]]
  labels = [f't = {t}' for t in np.asarray(p.schedule.time)[times]]
  return common.Drawn(
    tiles.reshape(-1, *tiles.shape[2:]),
    ['source', 'rec.', *inner, 'rec.', 'source'],
    labels * count,
  )


def unlike(x0: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
  """Splits images into n parts, and pairs the first of each with its farthest.

  Raises:
    UserError: If there are fewer than 2n images.
  """
  if len(x0) < 2 * n:
    raise errors.UserError(f'{n} pairs need {2 * n} images, not {len(x0)}')
  pairs = []
  for part in np.array_split(x0, n):
    gap = part.astype(np.float32) - part[0]
    pairs.append((part[0], part[np.square(gap).sum((1, 2, 3)).argmax()]))
  a, b = zip(*pairs, strict=True)
  return np.stack(a), np.stack(b)


def nearest(trained: common.Run, count: int = 8) -> common.Drawn:
  """Samples and their nearest training images, as in the appendix.

  Distances are squared differences of pixels, which reveal little but copies.
  """
  config, k = trained.config, 8
  draw = drawing.sampler(config, trained.engine, count)
  drawn, _ = drawing.gather(draw(trained.params, seed=trained.seed))
  near, squares = neighbours(drawn, dataset.source(config), k, config.data.flip)
  rmse = np.sqrt(squares[:, 0] / math.prod(drawn.shape[1:]))
  return common.Drawn(
    np.concatenate([drawn[:, None], near], axis=1),
    ['sample', *[f'{rank}.' for rank in range(1, near.shape[1] + 1)]],
    [f'RMSE {x:.1f}' for x in rmse],
  )


def neighbours(
  drawn: np.ndarray, source: Any, k: int, flip: bool
) -> tuple[np.ndarray, np.ndarray]:
  """The k nearest images of a source (n, k, ...), and squared distances (n, k).

  With `flip`, mirrored images are compared as well. The source is read once.
  """
  best = np.zeros((len(drawn), 0, *drawn.shape[1:]), np.uint8)
  squares = np.zeros((len(drawn), 0))
  with logs.Progress('comparing', len(source)) as bar:
    for start in range(0, len(source), 1024):
      index = np.arange(start, min(start + 1024, len(source)), dtype=np.int32)
      more = source.gather(index)['image']
      more = np.concatenate([more, more[:, :, ::-1]]) if flip else more
      gaps = (more.astype(np.float32) - x for x in drawn)
      far = np.stack([np.square(gap).sum((1, 2, 3)) for gap in gaps])
      squares = np.concatenate([squares, far], axis=1)
      order = squares.argsort(axis=1, kind='stable')[:, :k]
      squares = np.take_along_axis(squares, order, axis=1)
      both = (np.concatenate([row, more]) for row in best)
      best = np.stack([x[at] for x, at in zip(both, order, strict=True)])
      bar.update(len(index))
  return best, squares


def generation(trained: common.Run, count: int = 10) -> common.Drawn:
  """Greedy (σ = 0 at every step) and random samples from the same x_T.

  After Su's articles on DDPM; not in the paper. Each column has one x_T.
  """
  config, seed, draws = trained.config, trained.seed, 3
  ways = []
  for name in ('greedy', 'ancestral'):
    c = config.copy_and_resolve_references()
    c.sampler.update(name=name, eta=0.0)
    ways.append(build.sampler(c))
  greedy, random = ways

  def fn(params: Any, index: jax.Array) -> sampling.Drawn:
    keys, x_T = sampling.noise(config, seed, index)
    best, _, bad_t = samplers.sample(
      greedy.step, greedy.denoiser(params), keys, x_T
    )
    others = draws * index[:, None] + jnp.arange(draws)[None]
    keys, _ = sampling.noise(config, seed, others.ravel())
    drawn, _, bad = samplers.sample(
      *(random.step, random.denoiser(params), keys),
      jnp.repeat(x_T, draws, axis=0),
    )
    drawn = drawn.reshape(-1, draws, *x_T.shape[1:])
    every = [x_T[:, None], best[:, None], drawn]
    tiles = pixels.to_uint8(jnp.concatenate(every, axis=1))
    bad_t = jnp.maximum(bad_t, bad.reshape(-1, draws).max(1))
    return sampling.Drawn(tiles, None, bad_t)

  tiles = trained.map(fn, np.arange(count, dtype=np.int32)).swapaxes(0, 1)
  return common.Drawn(tiles, labels=['$x_T$', 'greedy', *['random'] * draws])
