"""`--mode=sample`: images from the weights of a run."""

import argparse
import functools
import math
import pathlib
import re
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import recipe
from ddpm_jax import sampling
from ddpm_jax.diffusion import training
from ddpm_jax.runtime import checkpoint
from ddpm_jax.runtime import images
from ddpm_jax.runtime import logs
from ddpm_jax.runtime import outputs
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime import workdir

JOB = command.Job('draws images from the weights of a run', processes=True)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.num_samples(p, 'images to draw (default: 64; of each prompt, 8)')
  command.output(
    p,
    'where images go: a folder (a PNG each), a .png (one grid) or an .npz '
    '(uint8 NHWC, `images`); default: a folder in --workdir, named by the '
    'settings',
  )
  condition_flags(p)


def condition_flags(p: Any) -> None:
  """Adds the flags that say what the images shall be of."""
  p.add_argument(
    '--prompt',
    action='append',
    metavar='TEXT',
    help='what the images shall be of, for a model of texts; may be repeated. '
    '--num_samples is then of each',
  )
  p.add_argument(
    '--prompts',
    type=command.local_path,
    metavar='FILE',
    help='the same, a line each',
  )
  p.add_argument(
    '--label',
    action='append',
    metavar='CLASS',
    help='the class, for a model of classes: a name of `classes.json` in '
    '--workdir, or else a number; may be repeated (default: all take turns)',
  )


def settle(args: argparse.Namespace) -> None:
  """Sets the number of samples, if the command line does not."""
  asked = args.prompt or args.prompts or args.label
  args.num_samples = args.num_samples or (8 if asked else 64)


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Draws `--num_samples` images into `--output`.

  Raises:
    UserError: if there is no run in `--workdir`, or `--output` is taken.
  """
  settle(args)
  check_workdir(args.workdir)
  seed = config.seed if args.seed is None else args.seed
  ending = '' if recipe.image_size(config) else '.npz'
  if args.output:
    if ending and outputs.kind(args.output) != ending:
      raise errors.UserError(f'--output={args.output}: points go into an .npz')
    outputs.prepare(args.output)
  wanted, told = asked(config, args)
  count = args.num_samples * max(len(wanted), 1)
  mesh = build.mesh(config)
  draw = sampler(config, mesh, count, seed)
  kind, step, params = restore(config, mesh, args.workdir)
  about = description(config, args, kind, step, wanted)
  name = f'samples_{settings(config, kind, step, seed, wanted)}{ending}'
  output = args.output or args.workdir / name
  outputs.check(output, count, about)
  logs.say(
    f'drawing {count} images with the {kind} weights of step {step}, '
    f'{config.sampler.steps} steps of {config.sampler.name} each'
  )

  def picture(drawn: np.ndarray) -> np.ndarray:
    if not wanted or args.num_samples > 32:
      return images.grid(drawn)
    tiles = drawn.reshape(len(wanted), -1, *recipe.shape(config))
    return images.labelled(tiles, labels=wanted)

  drawn = (image for image, _ in draw(params, told))
  outputs.save(output, drawn, count, about, picture=picture)
  if len(wanted) > 1:
    logs.say(
      f'{args.num_samples} of each of {len(wanted)} in turn, from '
      f'{wanted[0]!r} to {wanted[-1]!r}'
    )
  logs.say(f'{count} images: {output}')


def description(
  config: ConfigDict,
  args: argparse.Namespace,
  kind: str,
  step: int,
  wanted: list[str],
) -> outputs.About:
  """How images are made, to be kept beside them."""
  about = {
    'mode': args.mode,
    'run': str(args.workdir.resolve()),
    'step': step,
    'weights': kind,
    'seed': config.seed if args.seed is None else args.seed,
    'sampler': config.sampler.name,
    'steps': config.sampler.steps,
    **options(config),
  }
  condition = 'labels' if config.condition.name == 'label' else 'prompts'
  if wanted:
    about[condition] = wanted
  if len(wanted) > 1:
    n = args.num_samples
    about['order'] = f'image i is of {condition}[i // {n}]'
  elif not wanted and condition == 'labels':
    about['order'] = f'image i is of class i % {config.condition.classes}'
  return about


def options(config: ConfigDict) -> dict[str, Any]:
  """The keys of the sampler, beside name and steps, that change images."""
  every = recipe.to_json(config)['sampler']
  others = 'name', 'steps', 'weights', 'batch_size'
  return {key: x for key, x in every.items() if key not in others}


def settings(
  config: ConfigDict, kind: str, step: int, seed: int, wanted: list[str]
) -> str:
  """The main settings of samples, as a part of a file's name."""
  c = config.sampler
  parts = [f'seed{seed}', f'step{step}', f'{c.name}{c.steps}']
  if kind != 'EMA':
    parts.append(kind)
  if c.spacing != 'linear' and c.steps != config.schedule.T:
    parts.append(c.spacing)
  if c.eta:
    parts.append(f'eta{c.eta:g}')
  if config.condition.name and c.guidance != 1:
    parts.append(f'guidance{c.guidance:g}')
  if wanted:
    parts.append(re.sub(r'\W+', '-', '-'.join(wanted))[:40])
  return '_'.join(parts)


def asked(
  config: ConfigDict, args: argparse.Namespace
) -> tuple[list[str], Any]:
  """What `--prompt`, `--prompts` or `--label` ask for, and as conditions.

  The conditions have a row for each image: `--num_samples` of each in turn.

  Raises:
    UserError: if the model takes nothing of the kind.
  """
  prompts, labels = list(args.prompt or []), list(args.label or [])
  if args.prompts:
    prompts += read_prompts(args.prompts)
  kind = config.condition.name
  if labels and kind != 'label':
    raise errors.UserError(
      '--label is for models of config.condition.name=label'
    )
  if prompts and kind in ('', 'label'):
    raise errors.UserError(
      '--prompt is for models of config.condition.name=text'
    )
  if not prompts and not labels:
    if kind not in ('', 'label') and config.condition.drop == 0:
      raise errors.UserError(
        'name a --prompt: with config.condition.drop=0 the network was never '
        'trained without one'
      )
    return [], None
  rows: Any
  if labels:
    saved = workdir.read_classes(args.workdir) or ()
    numbers = [dataset.class_number(config, x, saved) for x in labels]
    labels = [dataset.class_title(config, n, saved) for n in numbers]
    rows = np.array(numbers, np.int32)
  else:
    rows = dataset.encode(config, prompts)
  each = jax.tree.map(lambda x: np.repeat(x, args.num_samples, axis=0), rows)
  return prompts or labels, each


def read_prompts(path: pathlib.Path) -> list[str]:
  try:
    lines = path.read_text(encoding='utf-8').splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(f'--prompts={path}: {error}') from None
  prompts = [line.strip() for line in lines if line.strip()]
  if not prompts:
    raise errors.UserError(f'--prompts={path} holds no text')
  return prompts


def check_workdir(folder: pathlib.Path | None) -> None:
  workdir.check_run(folder)


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
  abstract = parallel.abstract_state(init, mesh)
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
  """The same of the weights that there will be at the end."""
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
  n = parallel.parts(mesh)
  return math.ceil(min(count, config.sampler.batch_size) / n) * n


def drawer(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  count: int,
  draw: Callable,
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
  compiled = parallel.compile_map(
    draw, mesh, engine, jax.eval_shape(init).ema_params, name=name
  )

  def batch(params: Any, start: int, told: Any = None) -> Any:
    rows: Any = np.arange(start, start + size, dtype=np.int32)
    if told is not None:
      at = np.minimum(rows, count - 1)
      rows = {
        'index': rows,
        'condition': jax.tree.map(lambda x: x[at], told),
      }
    drawn = compiled(params, parallel.put_whole(rows, mesh, engine))
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
  draw: Callable,
  name: str = 'the sampler',
) -> Callable[..., Iterator[Any]]:
  """`drawer` of `count` images in all, batch by batch, with a bar."""
  size, batch = drawer(config, mesh, count, draw, name)

  def drawn(params: Any, told: Any = None) -> Iterator[Any]:
    for start in range(0, count, size):
      # The last batch is drawn whole, for one program serves all, and cut.
      full = batch(params, start, told)
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
  cut = functools.partial(parallel.cut_rows, mesh=mesh)
  draw = sampling.sampler(config, seed, snapshots, cut)
  batches = in_batches(config, mesh, count, draw)

  def pairs(params: Any, told: Any = None) -> Iterator[Any]:
    for drawn in batches(params, told):
      yield drawn.images, drawn.x0_hats

  return pairs


def gather(batches: Iterator[Any]) -> Any:
  """All batches as one."""
  return jax.tree.map(lambda *x: np.concatenate(x), *batches)
