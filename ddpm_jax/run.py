"""A run that was trained: its weights, and many images made with them."""

import functools
import math
import pathlib
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import recipe
from ddpm_jax import sampling
from ddpm_jax.diffusion import training
from ddpm_jax.parallel import engines
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage import logs
from ddpm_jax.storage import workdir


class Run(NamedTuple):
  """An opened workdir: a recipe, devices, and the weights of a checkpoint.

  Attributes:
    workdir: its folder.
    config: the recipe.
    mesh: the devices.
    weights: 'EMA' or 'raw'.
    step: of the checkpoint.
    params: the weights.
    seed: of what is drawn.
  """

  workdir: pathlib.Path
  config: ConfigDict
  mesh: jax.sharding.Mesh
  weights: str
  step: int
  params: Any
  seed: int

  def map(
    self, fn: Callable[[Any, Any], Any], rows: Any, *, name: str = 'the figure'
  ) -> Any:
    """fn(params, rows) of arrays with a row an example, over all devices.

    Args:
      fn: (params, rows) -> arrays with as many rows, or a `sampling.Drawn`, of
        which the images are returned.
      rows: arrays (n, ...).
      name: of `fn`, for the line that says that it is compiled.

    Raises:
      RunError: if an image, or a number, is not finite.
    """
    engine, n = self.config.parallel.engine, len(jax.tree.leaves(rows)[0])
    # Filled up with copies of the last row, until all devices have as many.
    index = np.arange(math.ceil(n / self.mesh.size) * self.mesh.size)
    filled = jax.tree.map(lambda x: x[np.minimum(index, n - 1)], rows)
    compiled = engines.compile_map(
      fn, self.mesh, engine, self.params, name=name
    )
    with logs.Progress('drawing', n) as bar:
      out = compiled(self.params, engines.put(filled, self.mesh, engine))
      bar.update(n)
    out = jax.tree.map(lambda x: x[:n], out)
    if isinstance(out, sampling.Drawn):
      check_finite(np.asarray(out.bad_t))
      return out.images
    if not all(np.all(np.isfinite(x)) for x in jax.tree.leaves(out)):
      raise errors.RunError(f'{name} would be of numbers that are not finite')
    return out

  def sample(self, count: int, condition: Any = None) -> np.ndarray:
    """Uint8 images (count, H, W, C), or points (count, D).

    Args:
      count: how many.
      condition: arrays with a row for each, as of `dataset.encode`; None for
        none, or for classes in turn.
    """
    draw = sampler(self.config, self.mesh, count, self.seed)
    return gather(images for images, _ in draw(self.params, condition))


def load(
  config: ConfigDict,
  workdir: pathlib.Path,
  *,
  seed: int | None = None,
  step: int | None = None,
  key: str = 'sampler.weights',
  mesh: jax.sharding.Mesh | None = None,
) -> Run:
  """Opens a workdir: the weights of its newest whole checkpoint.

  Args:
    config: its recipe, as of `recipe.resolve`.
    workdir: its folder.
    seed: of what is drawn; None for that of the recipe.
    step: of another checkpoint than the newest.
    key: the key of the recipe that says which weights, ema or raw.
    mesh: other devices than those of the recipe.

  Raises:
    UserError: if there is no such checkpoint.
  """
  mesh = build.mesh(config) if mesh is None else mesh
  kind, step, params = restore(config, mesh, workdir, step, key=key)
  seed = config.seed if seed is None else seed
  return Run(workdir, config, mesh, kind, step, params, seed)


def restore(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  folder: pathlib.Path,
  step: int | None = None,
  *,
  key: str = 'sampler.weights',
) -> tuple[str, int, Any]:
  """(name, step, weights) of the newest whole checkpoint, or of that at `step`.

  The name is 'EMA' or 'raw'. `key` is the key of the recipe that says which.
  Warns where the average still holds too much of the initial weights.
  """
  checkpoints = folder / 'checkpoints'
  init = functools.partial(build.init_state, config)
  abstract = engines.abstract_state(init, mesh)
  if recipe.flatten(config)[key] == 'raw':
    step, state = checkpoint.restore_item(
      checkpoints, 'state', checkpoint.trained(abstract), step
    )
    return 'raw', step, state['params']
  step, params = checkpoint.restore_item(
    checkpoints, 'ema', abstract.ema_params, step
  )
  warn_of_ema(config, folder, step, key)
  return 'EMA', step, params


def chosen(config: ConfigDict, state: training.TrainState) -> Any:
  """The weights of a state that images are drawn with."""
  raw = config.sampler.weights == 'raw'
  return state.params if raw else state.ema_params


def initial_share(config: ConfigDict, folder: pathlib.Path, step: int) -> float:
  """How much of the EMA weights of a step is the random weights of step 0.

  0 where training began from imported weights, of which an average is good.
  """
  if step == 0 or workdir.is_imported(folder):
    return 0.0
  return config.optimizer.ema**step


# An average that holds more than this of the initial weights is warned of.
MOST_INITIAL = 0.05


def warn_of_ema(
  config: ConfigDict,
  folder: pathlib.Path,
  step: int,
  key: str = 'sampler.weights',
) -> None:
  """Warns if the EMA weights of a step are mostly untrained."""
  share = initial_share(config, folder, step)
  if share > MOST_INITIAL:
    logs.say(
      f'warning: {share:.0%} of the EMA weights of step {step} is still the '
      f'random weights of step 0 (config.optimizer.ema={config.optimizer.ema}):'
      f' set --config.{key}=raw for the weights without the average, or train '
      f'anew with {_smaller_ema(step)}'
    )


def warn_before_training(config: ConfigDict, folder: pathlib.Path) -> None:
  """Warns if the EMA weights will be mostly untrained at the end."""
  share = initial_share(config, folder, config.steps)
  if share > MOST_INITIAL and config.sampler.weights == 'ema':
    logs.say(
      f'warning: after {config.steps} steps {share:.0%} of the EMA weights will'
      ' still be the random weights of step 0 '
      f'(config.optimizer.ema={config.optimizer.ema}): set '
      f'{_smaller_ema(config.steps)}, or --config.sampler.weights=raw to draw '
      'with the weights without the average'
    )


def _smaller_ema(steps: int) -> str:
  most = math.floor(1000 * MOST_INITIAL ** (1 / steps)) / 1000
  return f'--config.optimizer.ema={most} or less'


def at_a_time(config: ConfigDict, mesh: jax.sharding.Mesh, count: int) -> int:
  """How many images are drawn in a batch, of `count` in all."""
  n = engines.num_shards(mesh)
  return math.ceil(min(count, config.sampler.batch_size) / n) * n


def drawer(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  count: int,
  draw: sampling.Draw,
  name: str = 'the sampler',
) -> tuple[int, Callable[..., Any]]:
  """Compiles (params, index (B,)) -> `sampling.Drawn`.

  Returns a size b of batches, for `count` images, and a function of the
  weights, of the index of the first image, and of a condition for each image if
  `draw` takes one (see `sampling.sampler`), that gives b images. It raises
  RunError for images that are not finite. It is called `name` where it is said
  that it is compiled.
  """
  size = at_a_time(config, mesh, count)
  engine = config.parallel.engine
  init = functools.partial(build.init_state, config)
  compiled = engines.compile_map(
    draw, mesh, engine, jax.eval_shape(init).ema_params, name=name
  )

  def batch(params: Any, start: int, condition: Any = None) -> Any:
    rows: Any = np.arange(start, start + size, dtype=np.int32)
    if condition is not None:
      at = np.minimum(rows, count - 1)
      rows = {
        'index': rows,
        'condition': jax.tree.map(lambda x: x[at], condition),
      }
    drawn = compiled(params, engines.put_whole(rows, mesh, engine))
    check_finite(drawn.bad_t[: count - start], start)
    return drawn

  return size, batch


def check_finite(bad_t: np.ndarray, start: int = 0) -> None:
  """Refuses images of which something was not finite on the way.

  Args:
    bad_t: (n,), of each, see `samplers.Sampled`.
    start: the number of the first.

  Raises:
    RunError: naming the first of them, and the time.
  """
  if np.any(bad_t):
    i = int(np.flatnonzero(bad_t)[0])
    raise errors.RunError(
      f'image {start + i} is not finite from t = {bad_t[i]} on; nothing of it '
      'is written. Try --config.model.dtype=float32, another sampler, or an '
      'earlier checkpoint'
    )


def in_batches(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  count: int,
  draw: sampling.Draw,
  name: str = 'the sampler',
) -> Callable[..., Iterator[Any]]:
  """`drawer` of `count` images in all, batch by batch, with a bar."""
  size, batch = drawer(config, mesh, count, draw, name)

  def drawn(params: Any, condition: Any = None) -> Iterator[Any]:
    for start in range(0, count, size):
      # The last batch is drawn whole, for one program serves all, and cut.
      full = batch(params, start, condition)
      yield jax.tree.map(lambda x, real=count - start: x[:real], full)

  return lambda *args: logs.watched(drawn(*args), 'drawing', count)


def sampler(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  count: int,
  seed: int,
  snapshots: int = 0,
) -> Callable[..., Iterator[tuple[np.ndarray, np.ndarray]]]:
  """Uint8 images (b, H, W, C), and predictions on the way (b, K, H, W, C)."""
  cut = functools.partial(engines.cut_rows, mesh=mesh)
  draw = sampling.sampler(config, seed, snapshots, cut)
  batches = in_batches(config, mesh, count, draw)

  def pairs(params: Any, condition: Any = None) -> Iterator[Any]:
    for drawn in batches(params, condition):
      yield drawn.images, drawn.x0_hats

  return pairs


def gather(batches: Iterator[Any]) -> Any:
  """All batches as one."""
  return jax.tree.map(lambda *x: np.concatenate(x), *batches)
