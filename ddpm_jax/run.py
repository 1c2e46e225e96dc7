"""A trained run: its recipe, its weights, and what can be computed with them.

`ddpm_jax.load` and `ddpm_jax.train` return a `Run`; so do the jobs open one.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import drawing
from ddpm_jax import errors
from ddpm_jax import ranges
from ddpm_jax import recipe
from ddpm_jax import sampling
from ddpm_jax import validate
from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import training
from ddpm_jax.parallel import engines
from ddpm_jax.parallel import meshes
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage import logs
from ddpm_jax.storage import workdir


@dataclasses.dataclass(frozen=True)
class Run:
  """An opened workdir: a recipe, devices, and the weights of a checkpoint.

  >>> run = ddpm_jax.load('runs/digits')
  >>> images = run.sample(16, seed=1, steps=50, sampler='ddim')

  Attributes:
    workdir: The folder; None for weights that are in no workdir.
    config: The recipe.
    engine: The compiler, and the devices.
    weights: 'EMA' or 'raw'.
    step: The training step of the weights.
    params: The weights.
    seed: The default seed of `sample` and `bits_per_dim`.
  """

  workdir: pathlib.Path | None
  config: ConfigDict
  engine: engines.Engine
  weights: str
  step: int
  params: Any
  seed: int
  # Compiled functions by their settings, so that a second call is quick.
  _compiled: dict[Any, Any] = dataclasses.field(
    default_factory=dict, repr=False, compare=False
  )

  def sample(
    self,
    count: int,
    *,
    seed: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    prompt: str | None = None,
    label: str | int | None = None,
    progress: bool = False,
  ) -> np.ndarray:
    """Draws samples, the same as `--mode=sample` with the same settings.

    Image i depends on the seed and on i, not on `count` or the devices. The
    first call with new settings compiles.

    >>> sevens = run.sample(8, prompt='a seven', guidance=2)

    Args:
      count: Number of samples.
      seed: Seed; by default that of the run.
      steps: Number of sampler steps, at most T.
      sampler: Name of a sampler, such as 'ddim', or a dotted path.
      guidance: Scale of classifier-free guidance; 1 for none.
      prompt: Text, for a model of texts.
      label: Name or number of a class, for a model of classes. By default,
        sample i is of class i modulo the number of classes.
      progress: Whether to show messages and a progress bar.

    Returns:
      uint8 images (count, H, W, C); or float32 points (count, D).

    Raises:
      UserError: If a setting is not valid for this model.
      RunError: If a sample is not finite.
    """
    if count < 1:
      raise errors.UserError(f'count={count}: must be 1 or more')
    run = self._with(
      {
        'sampler.steps': steps,
        'sampler.name': sampler,
        'sampler.guidance': guidance,
      }
    )
    condition = run.condition(count, prompt=prompt, label=label)
    seed = self._seed(seed)
    with logs.shown(progress):
      return dataclasses.replace(run, seed=seed).draw(count, condition)

  def bits_per_dim(
    self,
    images: np.ndarray,
    *,
    draws: int | None = None,
    seed: int | None = None,
    prompt: str | None = None,
    label: str | int | None = None,
    progress: bool = False,
  ) -> np.ndarray:
    """Computes the variational bound of images in bits/dim  (eq. 5).

    >>> bits = run.bits_per_dim(images, draws=10).mean()

    Args:
      images: uint8 (N, H, W, C) of the model's shape.
      draws: Number of times t drawn per image, an unbiased estimate; 0 for all
        T of them. By default `config.evaluate.draws`.
      seed: Seed of the noise; by default that of the run.
      prompt: Text of all images, for a model of texts.
      label: Class of all images, for a model of classes.
      progress: Whether to show messages and a progress bar.

    Returns:
      float64 (N,), an upper bound on -log2 p(x_0) / dimensions for each image.

    Raises:
      UserError: If the images are not of the model's shape and dtype.
      RunError: If a term is not finite.
    """
    shape = recipe.shape(self.config)
    images = np.asarray(images)
    if not recipe.image_size(self.config):
      raise errors.UserError('bits/dim are defined for images, not for points')
    if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
      raise errors.UserError(
        f'images are {images.dtype} of shape {images.shape}; bits_per_dim '
        f'takes uint8 of shape (N, {", ".join(map(str, shape))})'
      )
    run = self._with({'evaluate.draws': draws})
    n = len(images)
    rows = {'image': images, 'index': np.arange(n, dtype=np.int32)}
    given = run.condition(n, prompt=prompt, label=label)
    if given is not None:
      text = recipe.condition_kind(self.config) == 'text'
      # A source gives several captions for each image.
      rows['text' if text else 'label'] = (
        jax.tree.map(lambda x: x[:, None], given) if text else given
      )
    elif self.config.condition.name:
      raise errors.UserError(
        f'this is a model of config.condition.name={self.config.condition.name}'
        ': name the prompt= or label= of the images'
      )
    seed = self._seed(seed)
    bound, found = sampling.bound(run.config, seed), []
    size = min(n, run.config.evaluate.batch_size)
    with logs.shown(progress):
      for start in range(0, n, size):
        # The last batch is padded, so that one program does for all.
        at = np.minimum(np.arange(start, start + size), n - 1)
        batch = jax.tree.map(lambda x, at=at: x[at], rows)
        part = run.map(bound, batch, name='the bound', key=seed)
        found.append(jax.tree.map(lambda x, real=n - start: x[:real], part))
    whole = likelihood.Bound(*drawing.gather(iter(found)))
    parts = likelihood.totals(whole, self.config.schedule.T)
    return np.asarray(sum(parts) * likelihood.BITS)

  def denoiser(self, condition: Any = None) -> denoisers.Denoiser:
    """The model p(x_{t-1} | x_t) with all T steps, for functions of your own.

    It is pure: use it under `jax.jit`, `jax.vmap` and `jax.grad`.

    >>> denoiser = run.denoiser()
    >>> x0 = diffusion.denoiser.x0_hat(denoiser, x_t, t)

    Args:
      condition: Arrays with a row for each example, from `condition`; None for
        none.
    """
    full = {'sampler.steps': self.config.schedule.T}
    config = recipe.changed_copy(self.config, full)
    return build.sampler(config).denoiser(self.params, condition)

  def condition(
    self,
    count: int,
    *,
    prompt: str | None = None,
    label: str | int | None = None,
  ) -> Any:
    """The condition of `count` examples, for `denoiser`.

    >>> denoiser = run.denoiser(run.condition(16, prompt='a seven'))

    Args:
      count: Number of examples.
      prompt: Text, for a model of texts.
      label: Name or number of a class, for a model of classes.

    Returns:
      Arrays with `count` rows; None without prompt and label.

    Raises:
      UserError: If the model has no such condition.
    """
    rows = dataset.conditions(
      self.config,
      [] if prompt is None else [prompt],
      [] if label is None else [str(label)],
      folder=self.workdir,
    )
    return jax.tree.map(lambda x: np.repeat(x, count, axis=0), rows)

  def draw(self, count: int, condition: Any = None) -> np.ndarray:
    """Draws samples with the recipe's settings and the run's seed.

    Args:
      count: Number of samples.
      condition: Arrays with a row for each sample; None for none, or for
        classes in turn.

    Returns:
      uint8 images (count, H, W, C); or float32 points (count, D).
    """
    draw = drawing.sampler(self.config, self.engine, count, self._compiled)
    batches = draw(self.params, condition, seed=self.seed)
    return np.concatenate([images for images, _ in batches])

  def map(
    self,
    fn: Callable[[Any, Any], Any],
    rows: Any,
    *,
    name: str = 'the figure',
    key: Any = None,
  ) -> Any:
    """Computes fn(params, rows) on all devices.

    Args:
      fn: (params, rows) -> arrays with as many rows, or a `sampling.Drawn`, of
        which the images are returned.
      rows: Arrays (n, ...).
      name: Name of `fn` in messages.
      key: Identifies `fn` for later calls, which then do not compile again;
        None for a function that is called once.

    Raises:
      RunError: If a result is not finite.
    """
    n, size = len(jax.tree.leaves(rows)[0]), self.engine.mesh.size
    # Padded with copies of the last row, to a multiple of the devices.
    index = np.arange(math.ceil(n / size) * size)
    padded = jax.tree.map(lambda x: x[np.minimum(index, n - 1)], rows)
    compiled = drawing.cached(
      {} if key is None else self._compiled,
      *(self.config, (name, key, len(index))),
      lambda: self.engine.compile_map(fn, self.params, name=name),
    )
    with logs.Progress('drawing', n) as bar:
      out = compiled(self.params, self.engine.put(padded))
      bar.update(n)
    out = jax.tree.map(lambda x: x[:n], out)
    if isinstance(out, sampling.Drawn):
      drawing.check_finite(np.asarray(out.bad_t))
      return out.images
    if not all(np.all(np.isfinite(x)) for x in jax.tree.leaves(out)):
      raise errors.RunError(f'{name} would be of numbers that are not finite')
    return out

  def _seed(self, seed: int | None) -> int:
    ranges.check({'seed': self.seed if seed is None else seed})
    return self.seed if seed is None else seed

  def _with(self, keys: dict[str, Any]) -> 'Run':
    """The run with other values of some keys; None leaves a key as it is."""
    said = {key: value for key, value in keys.items() if value is not None}
    if not said:
      return self
    config = recipe.changed_copy(self.config, said)
    validate.unread(config, said, said)
    validate.check(config)
    return dataclasses.replace(self, config=config)


def load(
  config: ConfigDict,
  workdir: pathlib.Path,
  *,
  seed: int | None = None,
  step: int | None = None,
  key: str = 'sampler.weights',
  engine: engines.Engine | None = None,
) -> Run:
  """Opens a workdir whose recipe has been resolved and checked.

  Args:
    config: The recipe, from `recipe.resolve`.
    workdir: The folder.
    seed: Seed; None for that of the recipe.
    step: The checkpoint; None for the newest intact one.
    key: The key of the recipe that names the weights, 'ema' or 'raw'.
    engine: Another engine than the recipe's.

  Raises:
    UserError: If there is no such checkpoint.
  """
  engine = engine or build.engine(config)
  kind, step, params = restore(config, engine.mesh, workdir, step, key=key)
  seed = config.seed if seed is None else seed
  return Run(workdir, config, engine, kind, step, params, seed)


def restore(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  folder: pathlib.Path,
  step: int | None = None,
  *,
  key: str = 'sampler.weights',
) -> tuple[str, int, Any]:
  """(kind, step, weights) of a checkpoint, by default the newest intact one.

  The kind is 'EMA' or 'raw', as the recipe's `key` says. Warns if the average
  still holds too much of the initial weights.
  """
  checkpoints = folder / 'checkpoints'
  init = functools.partial(build.init_state, config)
  abstract = meshes.abstract_state(init, mesh)
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
  """The weights of a training state that samples are drawn with."""
  raw = config.sampler.weights == 'raw'
  return state.params if raw else state.ema_params


def initial_share(config: ConfigDict, folder: pathlib.Path, step: int) -> float:
  """The share of the random initial weights in the EMA weights of a step.

  0 if training started from imported weights, whose average is useful.
  """
  if step == 0 or workdir.is_imported(folder):
    return 0.0
  return float(config.optimizer.ema**step)


# An average that holds more than this of the initial weights causes a warning.
MOST_INITIAL = 0.05


def warn_of_ema(
  config: ConfigDict,
  folder: pathlib.Path,
  step: int,
  key: str = 'sampler.weights',
) -> None:
  """Warns if the EMA weights of a step hold much of the initial weights."""
  share = initial_share(config, folder, step)
  if share > MOST_INITIAL:
    logs.warn(
      f'{share:.0%} of the EMA weights of step {step} is still the '
      f'random weights of step 0 (config.optimizer.ema={config.optimizer.ema}):'
      f' set --config.{key}=raw for the weights without the average, or train '
      f'again with {_smaller_ema(step)}'
    )


def warn_before_training(config: ConfigDict, folder: pathlib.Path) -> None:
  """Warns if the EMA weights will hold much of the initial weights."""
  share = initial_share(config, folder, config.steps)
  if share > MOST_INITIAL and config.sampler.weights == 'ema':
    logs.warn(
      f'after {config.steps} steps {share:.0%} of the EMA weights will'
      ' still be the random weights of step 0 '
      f'(config.optimizer.ema={config.optimizer.ema}): set '
      f'{_smaller_ema(config.steps)}, or --config.sampler.weights=raw to draw '
      'with the weights without the average'
    )


def _smaller_ema(steps: int) -> str:
  most = math.floor(1000 * MOST_INITIAL ** (1 / steps)) / 1000
  return f'--config.optimizer.ema={most} or less'
