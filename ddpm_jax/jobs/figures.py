"""`--mode=figures --figure=NAME`: the figures of the paper, from any run.

A function of this module that takes `trained` is a figure, and its name is what
`--figure` says. Its `count`, if it has one, is `--num_samples`. Figures are
drawn anew from the EMA weights, never from numbers that were stored.
"""

import argparse
import functools
import inspect
import math
import pathlib
import sys
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax.data import store
from ddpm_jax.diffusion import editing
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import pixels
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules as tables
from ddpm_jax.diffusion import two_noise
from ddpm_jax.diffusion import two_term as two_term_form
from ddpm_jax.jobs import compress
from ddpm_jax.jobs import decompress
from ddpm_jax.jobs import evaluate
from ddpm_jax.jobs import sample
from ddpm_jax.jobs import score
from ddpm_jax.metrics import classifier as classifiers
from ddpm_jax.metrics import distances
from ddpm_jax.metrics import small
from ddpm_jax.runtime import images
from ddpm_jax.runtime import logs
from ddpm_jax.runtime import parallel


class Trained(NamedTuple):
  """A run that has been trained."""

  config: ConfigDict
  mesh: jax.sharding.Mesh
  params: Any  # the EMA weights
  seed: int
  workdir: pathlib.Path

  def map(self, fn: Callable[[Any, Any], Any], rows: Any) -> Any:
    """fn(params, rows) of arrays with a row an example, over all devices."""
    engine, n = self.config.parallel.engine, len(jax.tree.leaves(rows)[0])
    # Filled up with copies of the last row, until all devices have as many.
    index = np.arange(math.ceil(n / self.mesh.size) * self.mesh.size)
    filled = jax.tree.map(lambda x: x[np.minimum(index, n - 1)], rows)
    compiled = parallel.compile_map(fn, self.mesh, engine, self.params)
    out = compiled(self.params, parallel.put(filled, self.mesh, engine))
    return jax.tree.map(lambda x: x[:n], out)


class Drawn(NamedTuple):
  """A figure: tiles, with words to them, below a plot; perhaps a film."""

  tiles: np.ndarray | None = None  # uint8 (rows, columns, H, W, C)
  titles: Sequence[str] = ()  # of the columns
  labels: Sequence[str] = ()  # of the rows
  plot: np.ndarray | None = None
  # Frames (F, rows, columns, H, W, C), and what stands above each.
  frames: np.ndarray | None = None
  heads: Sequence[str] = ()


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Writes `figure_NAME.png`, and .gif where time moves, into `--workdir`.

  Raises:
    UserError: if there is no such figure, no run in `--workdir`, or no images.
  """
  figure = named(args.figure)
  options = {} if args.num_samples is None else {'count': args.num_samples}
  options |= {} if args.images is None else {'path': args.images}
  names = {'count': '--num_samples', 'path': '--images'}
  for option in options.keys() - inspect.signature(figure).parameters:
    raise errors.UserError(f'--figure={args.figure} takes no {names[option]}')
  sample.check_workdir(args.workdir)
  path = args.output or args.workdir / f'figure_{args.figure}.png'
  if path.suffix != '.png':
    raise errors.UserError(f'--output={path} must end in .png')
  sample.check_output(path, 1)
  build.check(config)
  if not build.image_size(config):
    raise errors.UserError('figures are of images, and this run is of points')
  seed = config.seed if args.seed is None else args.seed
  mesh = build.mesh(config)
  step, params = sample.restore_ema(config, mesh, args.workdir)
  logs.say(f'figure {args.figure}: the EMA weights of step {step}')
  trained = Trained(config, mesh, params, seed, args.workdir)
  save(path, figure(trained, **options))


def save(path: pathlib.Path, drawn: Drawn) -> None:
  parts = [] if drawn.plot is None else [drawn.plot]
  if drawn.tiles is not None:
    parts += [images.labelled(drawn.tiles, drawn.titles, drawn.labels)]
  images.save_png(path, images.stack(parts))
  logs.say(f'figure               {path}')
  if drawn.frames is not None:
    film = path.with_suffix('.gif')
    shown = zip(drawn.frames, drawn.heads, strict=True)
    frames = [images.labelled(tiles, head=head) for tiles, head in shown]
    images.save_gif(film, frames, 80)
    logs.say(f'the same, moving     {film}')


def named(name: str | None) -> Callable[..., Drawn]:
  known = build.functions(sys.modules[__name__], 'trained')
  if not name:
    raise errors.UserError(f'name a --figure; known: {", ".join(known)}')
  if name not in known:
    raise errors.unknown('figure', name, known)
  return known[name]


def spread(T: int, n: int) -> list[int]:
  """n + 1 times from 0 to T, evenly; fewer if T is smaller."""
  return sorted({round(T * k / n) for k in range(n + 1)})


def real(config: ConfigDict, seed: int, count: int) -> np.ndarray:
  """Some images of the split to evaluate on, uint8; all if they are fewer."""
  source = build.source(config, config.evaluate.split or config.data.split)
  return source.gather(some(len(source), seed, count))['image']


def some(n: int, seed: int, count: int) -> np.ndarray:
  """`count` of n, in random order; all if they are fewer."""
  index = np.random.default_rng(seed).permutation(n)[:count]
  return index.astype(np.int32)


def noised(
  table: tables.Schedule, x0: Any, times: Any, eps: jax.Array
) -> np.ndarray:
  """uint8 x_t of uint8 images, (images, times, H, W, C)  (eq. 4).

  On one device: there is no network in it.
  """
  over_times = jax.vmap(process.q_sample, (None, None, 0, None))
  over_images = jax.vmap(over_times, (None, 0, None, 0))
  x_t = over_images(table, pixels.to_float(jnp.asarray(x0)), times, eps)
  return np.asarray(pixels.to_uint8(x_t))


def forward(trained: Trained, count: int = 6) -> Drawn:
  """Images becoming noise under q: the chain of figure 2, from right to left.

  An image keeps one ε for all t, so that the film is of one thing.
  """
  config, table = trained.config, build.schedule(trained.config)
  x0 = real(config, trained.seed, count)
  _, eps = build.noise(config, trained.seed, jnp.arange(len(x0)))
  film = np.array(spread(table.T, 50))
  x_t = noised(table, x0, film, eps)
  shown = spread(len(film) - 1, 10)
  heads = [f't = {t}' for t in film]
  return Drawn(
    x_t[:, shown],
    [heads[k] for k in shown],
    frames=x_t.swapaxes(0, 1)[:, None],
    heads=heads,
  )


def every_schedule(config: ConfigDict) -> dict[str, tables.Schedule]:
  """All schedules with the keys of a recipe; equal ones share a line."""
  names: dict[bytes, list[str]] = {}
  known: dict[bytes, tables.Schedule] = {}
  for name, function in build.functions(tables, 'T').items():
    table = build.call(function, config.schedule)
    same = np.asarray(table.alpha_bar).tobytes()
    names.setdefault(same, []).append(name)
    known[same] = table
  return {', '.join(names[same]): table for same, table in known.items()}


def schedules(trained: Trained) -> Drawn:
  """ᾱ_t and SNR of all schedules, and one image under each; not in the paper.

  The schedule of the run itself is the thick line, and the marked row.
  """
  config, every = trained.config, every_schedule(trained.config)
  own = next(k for k in every if config.schedule.name in k.split(', '))
  t = np.arange(1, config.schedule.T + 1)
  signal, snr = {}, {}
  for name, s in every.items():
    signal[name] = t, np.asarray(s.alpha_bar)[1:]
    snr[name] = t, np.asarray(s.alpha_bar / s.one_minus_alpha_bar)[1:]
  panels = [
    images.Panel('t', r'$\bar\alpha_t$', signal),
    images.Panel(
      't', r'SNR, $\bar\alpha_t / (1 - \bar\alpha_t)$', snr, bottom=1e-6
    ),
  ]
  x0 = real(config, trained.seed, 1)
  _, eps = build.noise(config, trained.seed, jnp.arange(1))
  times = np.array(spread(config.schedule.T, 10))
  strips = [noised(s, x0, times, eps)[0] for s in every.values()]
  return Drawn(
    np.stack(strips),
    [f't = {t}' for t in times],
    [f'{"▸ " if name == own else ""}{name}' for name in every],
    plot=images.plot(panels, own),
  )


def progressive(trained: Trained, count: int = 8) -> Drawn:
  """x̂_0 of samples at ten times on the way: figure 6."""
  config, N = trained.config, trained.config.sampler.steps
  K = min(50, N)
  draw = sample.sampler(config, trained.mesh, count, trained.seed, snapshots=K)
  _, seen = sample.gather(draw(trained.params))
  heads = [f't = {t}' for t in snapshot_times(config, K)]
  # The last is the sample itself.
  shown = [round(K * k / min(K, 10)) - 1 for k in range(1, min(K, 10) + 1)]
  return Drawn(
    seen[:, shown],
    [heads[k] for k in shown],
    frames=seen.swapaxes(0, 1)[:, None],
    heads=heads,
  )


def quality(trained: Trained, count: int = 500) -> Drawn:
  """Sample quality by reverse step: figure 10, with the small-data score.

  Of x̂_0 at twenty times on the way, in the features of a classifier of the
  data; see `metrics/small.py`.
  """
  config, N = trained.config, trained.config.sampler.steps
  K = min(20, N)
  data, classifier = score.judge(config, trained.workdir)
  judged = functools.partial(classifiers.features_and_probabilities, classifier)
  draw = sample.sampler(config, trained.mesh, count, trained.seed, snapshots=K)
  _, seen = sample.gather(draw(trained.params))
  real, _ = judged(data['image'])
  times, frechet, sure = snapshot_times(config, K), [], []
  print('    t   Fréchet (classifier)   sure')
  for k, t in enumerate(times):
    features, probabilities = judged(seen[:, k])
    frechet += [
      distances.frechet(*distances.moments(real), *distances.moments(features))
    ]
    sure += [np.mean(probabilities.max(axis=1) > small.SURE)]
    print(f'{t:5}   {frechet[-1]:20.3f}   {sure[-1]:4.0%}')
  step = config.schedule.T + 1 - np.array(times)
  words = 'Fréchet distance, features of a classifier'
  low, share = 0.5 * min(frechet), f'share that is over {small.SURE:.0%} sure'
  panels = [
    images.Panel('reverse step', words, {'': (step, np.array(frechet))}, low),
    images.Panel('reverse step', share, {'': (step, np.array(sure))}),
  ]
  return Drawn(plot=images.plot(panels))


def snapshot_times(config: ConfigDict, K: int) -> list[int]:
  """The times that K snapshots of `samplers.sample` are of.

  Found by sampling with a step of which the prediction is the time.
  """
  table = build.reverse_process(config).schedule

  def clock(table: Any, model_fn: Any, keys: Any, x: Any, t: Any) -> Any:
    return x, jnp.full_like(x, table.time[t])

  keys = jax.random.split(jax.random.key(0), 1)
  _, seen = samplers.sample(
    clock, table, lambda x, t: x, keys, jnp.zeros(1), snapshots=K
  )
  return np.asarray(seen)[:, 0].astype(int).tolist()


def shared(trained: Trained, count: int = 7) -> Drawn:
  """Samples that share x_t, at several t: figure 7.

  One chain runs to x_t, and `count` others go on from there, with noise of
  their own. The less noise is shared, the more of the image is.
  """
  config, seed = trained.config, trained.seed
  p = build.reverse_process(config)
  forks = np.array(spread(p.schedule.T, 4)[::-1])

  def fn(params: Any, rows: dict[str, jax.Array]) -> jax.Array:
    t, first = rows['t'], rows['chain']
    chain = p.schedule, p.model_fn(params)
    keys, x_T = build.noise(config, seed, first)
    to_x_t = editing.between(p.step, p.schedule.T, t + 1)
    x_t, _ = samplers.sample(to_x_t, *chain, keys, x_T)
    others = first[:, None] + 1 + jnp.arange(count)
    keys, _ = build.noise(config, seed, others.ravel())
    from_x_t = editing.between(p.step, jnp.repeat(t, count))
    x_0, _ = samplers.sample(from_x_t, *chain, keys, jnp.repeat(x_t, count, 0))
    x_0 = x_0.reshape(-1, count, *x_t.shape[1:])
    return pixels.to_uint8(jnp.concatenate([x_t[:, None], x_0], axis=1))

  tiles = trained.map(fn, {'t': forks, 'chain': np.zeros_like(forks)})
  told = np.asarray(p.schedule.time)[forks]
  titles = ['$x_t$', *[f'{k + 1}' for k in range(count)]]
  return Drawn(tiles, titles, [f't = {t}' for t in told])


def interpolation(trained: Trained, count: int = 1) -> Drawn:
  """Two images mixed at x_t and denoised, for several t: figures 8 and 9.

  Each of `count` pairs of images has one ε, and one noise for all of its
  chains. At λ = 0 and 1 the images are reconstructed; at t = T there is next to
  nothing of them in x_T, and a row is of one image.
  """
  config, seed = trained.config, trained.seed
  p = build.reverse_process(config)
  a, b = unlike(real(config, seed, 16 * count), count)
  T = p.schedule.T
  times = np.array(sorted({math.ceil(T * k / 8) for k in (1, 2, 4, 6, 8)}))
  weights = np.linspace(0, 1, 11, dtype=np.float32)
  shape = count, len(times), len(weights)
  pair, t, weight = np.broadcast_arrays(
    np.arange(count)[:, None, None], times[:, None], weights
  )

  def fn(params: Any, rows: dict[str, jax.Array]) -> jax.Array:
    keys, eps = build.noise(config, seed, rows['pair'])
    x_t = jax.vmap(editing.interpolate, (None, 0, 0, 0, 0, 0))(
      p.schedule,
      *(pixels.to_float(rows['a']), pixels.to_float(rows['b'])),
      *(rows['t'], rows['weight'], eps),
    )
    step = editing.between(p.step, rows['t'])
    x_0, _ = samplers.sample(step, p.schedule, p.model_fn(params), keys, x_t)
    return pixels.to_uint8(x_0)

  rows = {'pair': pair.ravel(), 't': t.ravel(), 'weight': weight.ravel()}
  rows |= {'a': a[rows['pair']], 'b': b[rows['pair']]}
  mixed = trained.map(fn, rows).reshape(*shape, *a.shape[1:])
  sources = [
    np.broadcast_to(x[:, None, None], (*shape[:2], 1, *x.shape[1:]))
    for x in (a, b)
  ]
  tiles = np.concatenate([sources[0], mixed, sources[1]], axis=2)
  inner = [f'λ = {weight:.1f}' for weight in weights[1:-1]]
  told = [f't = {t}' for t in np.asarray(p.schedule.time)[times]]
  return Drawn(
    tiles.reshape(-1, *tiles.shape[2:]),
    ['source', 'rec.', *inner, 'rec.', 'source'],
    told * count,
  )


def unlike(x0: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
  """n pairs: an image of each n-th part of them, and the one least like it.

  Raises:
    UserError: if there are not two images for each.
  """
  if len(x0) < 2 * n:
    raise errors.UserError(f'{n} pairs are more than {len(x0)} images make')
  pairs = []
  for part in np.array_split(x0, n):
    gap = part.astype(np.float32) - part[0]
    pairs.append((part[0], part[np.square(gap).sum((1, 2, 3)).argmax()]))
  a, b = zip(*pairs, strict=True)
  return np.stack(a), np.stack(b)


def rate_distortion(trained: Trained, count: int = 64) -> Drawn:
  """Progressive lossy compression: figure 5, and the appendix's table of it.

  The rate at t is what tells x_t to one who has the model (Algorithms 3 and 4),
  the distortion the error of x̂_0 made of it. Exact in t, for the first `count`
  images of the split to evaluate on.
  """
  config = trained.config.copy_and_resolve_references()
  config.evaluate.draws = 0
  split = config.evaluate.split or config.data.split
  source = build.source(config, split)
  count = min(count, len(source))
  bound = evaluate.bound_of(
    config, trained.mesh, trained.params, source, count, trained.seed
  )
  rate, rmse = progress(bound)
  print(table(rate, rmse, f'{count} images of {split}'))
  step, words = np.arange(1, len(rate) + 1), 'RMSE of 0..255'
  panels = [
    images.Panel('reverse step', words, {'': (step, rmse)}),
    images.Panel('reverse step', 'rate, bits/dim', {'': (step, rate)}),
    images.Panel('rate, bits/dim', words, {'': (rate, rmse)}),
  ]
  return Drawn(plot=images.plot(panels))


def codec(
  trained: Trained, count: int = 32, path: pathlib.Path | None = None
) -> Drawn:
  """What the codec sends of real images, and what comes of every part of it.

  Beside ΣKL, by steps received; and RMSE by bits/dim beside that of the bound,
  which is of all T steps and sends nothing, and of JPEG and WebP. Of each a
  thinner line leaves out what is header. `path` is of images to take in the
  place of those of the split to evaluate on.
  """
  config = trained.config.copy_and_resolve_references()
  config.evaluate.draws = 0
  if path is None:
    x0 = real(config, trained.seed, count)
  else:
    x0 = compress.read(path, config)
    x0 = x0[some(len(x0), trained.seed, count)]
  params = jax.device_get(trained.params)
  sent = compress.send(config, params, x0, trained.seed)
  table = compress.table(sent, x0)
  _, shown, seconds = decompress.images_of(config, params, sent.data)
  same = 'the very image' if np.array_equal(shown, sent.shown[-1]) else 'OTHERS'
  print(f'{table}\n{seconds / len(x0):.3f} to decode, to {same} of the sender')
  source = store.from_arrays(x0, np.full(len(x0), -1, np.int32))
  bound = evaluate.bound_of(
    config, trained.mesh, trained.params, source, len(x0), trained.seed
  )
  spent, theory = compress.spent(sent, x0), progress(bound)
  around = 8 * sent.around / x0.size
  curves = {
    'codec, whole file': (spent.code + around, spent.rmse),
    'codec, without header': (spent.code, spent.rmse),
    'ΣKL of its steps': (spent.kl, spent.rmse),
    f'bound, all {config.schedule.T} steps': theory,
  }
  for form in ('JPEG', 'WEBP'):
    whole, inner, rmse = by_quality(x0, form)
    print(quality_table(form, whole, inner, rmse))
    curves[f'{form}, whole file'] = whole, rmse
    curves[f'{form}, without header'] = inner, rmse
  most = max(spent.code[-1] + around, 1)
  near = {
    name: (x[x <= 2 * most], np.asarray(y)[x <= 2 * most])
    for name, (x, y) in curves.items()
  }
  steps = np.arange(len(spent.kl))
  both = {'code': (steps, spent.code), 'ΣKL': (steps, spent.kl)}
  panels = [
    images.Panel('bits/dim', 'RMSE of 0..255', near),
    images.Panel('steps received', 'code (above) and ΣKL, bits/dim', both),
  ]
  return Drawn(plot=images.plot(panels))


def by_quality(
  x0: np.ndarray, form: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Bits/dim of whole files and without headers, and RMSE, by quality."""
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
  """For a person."""
  lines = [f'{form}: whole file (bits/dim)   without header   RMSE (0..255)']
  for row in zip(whole, inner, rmse, strict=True):
    lines += ['{:27.3f}   {:14.3f}   {:13.3f}'.format(*row)]
  return '\n'.join(lines)


def progress(bound: likelihood.Bound) -> tuple[np.ndarray, np.ndarray]:
  """Rate, bits/dim, and RMSE, in 0..255, at reverse steps 1..T (t = T..1).

  Means over the images of a bound at all times. L_T tells x_T; then L_{s-1}
  tells x_{s-1}, so that x_t has cost L_T + Σ_{s>t} L_{s-1}.
  """
  nats = np.asarray(bound.terms, np.float64).mean(0)[1:]  # for x_1..x_{T-1}
  prior = np.asarray(bound.prior, np.float64).mean()
  rate = np.cumsum([prior, *nats[::-1]]) * likelihood.BITS
  mse = np.asarray(bound.mse, np.float64).mean(0)
  return rate, 127.5 * np.sqrt(mse[::-1])


def table(rate: np.ndarray, rmse: np.ndarray, of: str) -> str:
  """For a person, as in the paper's appendix."""
  lines = ['reverse step   rate (bits/dim)   RMSE (0..255)']
  for step in spread(len(rate), 10)[:0:-1]:
    lines += [f'{step:12}   {rate[step - 1]:15.5f}   {rmse[step - 1]:13.5f}']
  return '\n'.join([*lines, f'means over {of}, one x_t each at every t'])


def nearest(trained: Trained, count: int = 8) -> Drawn:
  """Samples beside the nearest images trained on, as in the appendix.

  By squared distance in pixels, which sees copies and little else.
  """
  config, k = trained.config, 8
  draw = sample.sampler(config, trained.mesh, count, trained.seed)
  drawn, _ = sample.gather(draw(trained.params))
  near, squares = neighbours(drawn, build.source(config), k, config.data.flip)
  rmse = np.sqrt(squares[:, 0] / math.prod(drawn.shape[1:]))
  return Drawn(
    np.concatenate([drawn[:, None], near], axis=1),
    ['sample', *[f'{rank}.' for rank in range(1, near.shape[1] + 1)]],
    [f'RMSE {x:.1f}' for x in rmse],
  )


def neighbours(
  drawn: np.ndarray, source: Any, k: int, flip: bool
) -> tuple[np.ndarray, np.ndarray]:
  """The k nearest images of a source (n, k, ...), and squared distances (n, k).

  Mirrored ones as well, where those were trained on. The source is read once.
  """
  best = np.zeros((len(drawn), 0, *drawn.shape[1:]), np.uint8)
  squares = np.zeros((len(drawn), 0))
  with logs.progress(len(source), 0, 'images', show=True) as bar:
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


def generation(trained: Trained, count: int = 10) -> Drawn:
  """Greedy generation (σ = 0 at every step) and random, of the same x_T.

  After Su's articles on DDPM; not in the paper. A column is of one x_T.
  """
  config, seed, draws = trained.config, trained.seed, 3
  ways = []
  for name in ('greedy', 'ancestral'):
    c = config.copy_and_resolve_references()
    c.sampler.name = name
    ways.append(build.reverse_process(c))
  greedy, random = ways

  def fn(params: Any, index: jax.Array) -> jax.Array:
    model_fn = random.model_fn(params)
    keys, x_T = build.noise(config, seed, index)
    best, _ = samplers.sample(greedy.step, greedy.schedule, model_fn, keys, x_T)
    others = draws * index[:, None] + jnp.arange(draws)
    keys, _ = build.noise(config, seed, others.ravel())
    drawn, _ = samplers.sample(
      *(random.step, random.schedule, model_fn, keys),
      jnp.repeat(x_T, draws, axis=0),
    )
    drawn = drawn.reshape(-1, draws, *x_T.shape[1:])
    every = [x_T[:, None], best[:, None], drawn]
    return pixels.to_uint8(jnp.concatenate(every, axis=1))

  tiles = trained.map(fn, np.arange(count, dtype=np.int32)).swapaxes(0, 1)
  return Drawn(tiles, labels=['$x_T$', 'greedy', *['random'] * draws])


def gradients(trained: Trained, count: int = 256) -> Drawn:
  """How much the gradients of two losses of one minimum vary, by t.

  `two_noise` and `one_noise` of the notes, on the trained network. The variance
  is the trace of the covariance over `count` images with their noise; its
  estimate, E_v Var(v·∇L) over directions v ~ N(0, I), needs no gradient an
  example, but a forward pass with tangents.
  """
  config, directions = trained.config, 8
  x0 = real(config, trained.seed, count)
  table, network = build.schedule(config), build.reverse_process(config)
  predict = build.reverse(config, config.model.variance)['predict']
  times = np.array(spread(table.T, 20)[1:])
  times = np.unique([1, 2, *times])
  forms = two_noise.two_noise, two_noise.one_noise
  own_noise = jax.vmap(
    functools.partial(two_noise.own_noise, table, predict=predict)
  )

  def fn(params: Any, rows: dict[str, jax.Array]) -> jax.Array:
    images, keys = pixels.to_float(rows['x0']), rows['keys']

    def losses(params: Any, t: jax.Array) -> jax.Array:
      def model_fn(x_t: jax.Array, t: jax.Array) -> jax.Array:
        out, _ = process.split(network.model_fn(params)(x_t, t), x_t)
        return own_noise(x_t, out, t)

      t = jnp.full(len(images), t)
      every = [f(table, model_fn, keys, images, t) for f in forms]
      return jnp.stack(every, axis=1)

    def slopes(t: jax.Array, direction: jax.Array) -> jax.Array:
      leaves, tree = jax.tree.flatten(params)
      k = jax.random.split(jax.random.key(direction), len(leaves))
      v = [
        jax.random.normal(k_leaf, leaf.shape)
        for k_leaf, leaf in zip(k, leaves, strict=True)
      ]
      return jax.jvp(
        lambda p: losses(p, t), (params,), (jax.tree.unflatten(tree, v),)
      )[1]

    grid = jnp.meshgrid(times, jnp.arange(directions), indexing='ij')
    each = jax.lax.map(lambda x: slopes(*x), tuple(x.ravel() for x in grid))
    each = each.reshape(len(times), directions, *each.shape[1:])
    return jnp.moveaxis(each, 2, 0)  # (B, times, directions, forms)

  keys, _ = build.noise(config, trained.seed, jnp.arange(len(x0)))
  each = trained.map(fn, {'x0': x0, 'keys': keys}).astype(np.float64)
  two, one = each.var(0, ddof=1).mean(1).T
  print(gradient_table(times, two, one))
  curves = {'two noises': (times, two), 'one noise': (times, one)}
  bottom = 0.5 * min(two.min(), one.min())
  panels = [
    images.Panel('t', 'variance of the gradient', curves, bottom),
    images.Panel('t', 'two noises / one', {'': (times, two / one)}, 0.5),
  ]
  return Drawn(plot=images.plot(panels))


def gradient_table(times: np.ndarray, two: np.ndarray, one: np.ndarray) -> str:
  """For a person."""
  lines = ['variance of the gradient: t   two noises   one noise   ratio']
  for row in zip(times, two, one, two / one, strict=True):
    lines += ['{:27}   {:10.3g}   {:9.3g}   {:5.4g}'.format(*row)]
  return '\n'.join(lines)


def two_term(trained: Trained, count: int = 8) -> Drawn:
  """How noisy the bound's form in two terms is, beside that in three.

  Each is drawn 16 times for each of `count` images, and noise is the standard
  deviation over what is drawn for one image.
  """
  config, draws = trained.config.copy_and_resolve_references(), 16
  config.evaluate.draws = 0
  x0 = real(config, trained.seed, count)
  index = np.arange(len(x0) * draws, dtype=np.int32)
  rows = {'image': np.repeat(x0, draws, axis=0), 'index': index}
  forms = {
    'three terms': build.bound(config, trained.seed),
    'two terms': build.bound_by(two_term_form.bound, config, trained.seed),
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
    images.Panel(
      't',
      'noise of a term, bits/dim',
      {name: (t, x) for name, x in noise.items()},
      0.5 * min(three.min(), two.min()),
    ),
    images.Panel('t', 'two terms / three', {'': (t, two / three)}, 0.5),
  ]
  return Drawn(plot=images.plot(panels))


def two_term_table(drawn: dict[str, np.ndarray]) -> str:
  """Of bits/dim (images, draws, 1 + T), L_T first, for a person."""
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
