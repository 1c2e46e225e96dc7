"""`--mode=sample`: images from the EMA weights of a run."""

import argparse
import functools
import math
import pathlib
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import checks
from ddpm_jax import conditioning
from ddpm_jax import errors
from ddpm_jax import functions
from ddpm_jax import recipe
from ddpm_jax.runtime import checkpoint
from ddpm_jax.runtime import images
from ddpm_jax.runtime import logs
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime import processes
from ddpm_jax.runtime import workdir

many_processes = True


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Draws `--num_samples` images into `--output`.

  Raises:
    UserError: if there is no run in `--workdir`, or `--output` is taken.
  """
  check_workdir(args.workdir)
  seed = config.seed if args.seed is None else args.seed
  kind = '' if recipe.image_size(config) else '.npz'
  output = args.output or args.workdir / f'samples_seed{seed}{kind}'
  if kind and output.suffix != kind:
    raise errors.UserError(f'--output={output}: points go into an .npz')
  checks.basics(config)
  wanted, told = asked(config, args)
  count = args.num_samples * max(len(wanted), 1)
  check_output(output, count)
  mesh = build.mesh(config)
  draw = sampler(config, mesh, count, seed)
  step, params = restore_ema(config, mesh, args.workdir)
  logs.say(
    f'drawing {count} images with the EMA weights of step {step}, '
    f'{config.sampler.steps} steps of {config.sampler.name} each'
  )
  drawn = (image for image, _ in draw(params, told))
  if wanted and output.suffix == '.png' and args.num_samples <= 32:
    tiles = gather(drawn).reshape(len(wanted), -1, *recipe.shape(config))
    if processes.leads():
      images.save_png(output, images.labelled(tiles, labels=wanted))
  else:
    save(output, drawn, count)
  if len(wanted) > 1:
    logs.say(
      f'{args.num_samples} of each of {len(wanted)} in turn, from '
      f'{wanted[0]!r} to {wanted[-1]!r}'
    )
  logs.say(f'{count} images: {output}')


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
    return [], None
  rows: Any
  if labels:
    rows = np.array(
      [conditioning.class_number(config, x) for x in labels], np.int32
    )
  else:
    rows = conditioning.encode(config, prompts)
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
  if folder is None or not folder.is_dir():
    raise errors.UserError(
      f'no run in {folder}: name one, as --workdir=runs/NAME'
    )


def restore_ema(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  folder: pathlib.Path,
  step: int | None = None,
) -> tuple[int, Any]:
  """(step, weights) of the newest whole checkpoint of a run, or at `step`."""
  init = functools.partial(functions.init_state, config)
  abstract = parallel.abstract_state(init, mesh).ema_params
  return checkpoint.restore_item(folder / 'checkpoints', 'ema', abstract, step)


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
  """Compiles (params, index (B,)) -> arrays with a row an image.

  Returns a size b of batches, for `count` images, and a function of the
  weights, of the index of the first image, and of a condition for each image if
  `draw` takes one (see `functions.sampler`), that gives the arrays of b images.
  It is called `name` where it is said that it is compiled.
  """
  size = at_a_time(config, mesh, count)
  engine = config.parallel.engine
  init = functools.partial(functions.init_state, config)
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
    return compiled(params, parallel.put_whole(rows, mesh, engine))

  return size, batch


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
  draw = functions.sampler(config, seed, snapshots, cut)
  return in_batches(config, mesh, count, draw)


def gather(batches: Iterator[Any]) -> Any:
  """All batches as one."""
  return jax.tree.map(lambda *x: np.concatenate(x), *batches)


def names(count: int) -> list[str]:
  return [f'{i:06d}.png' for i in range(count)]


def check_output(output: pathlib.Path, count: int) -> None:
  """Refuses what cannot be written, before minutes are spent.

  Raises:
    UserError: if it cannot be written, or holds images that would be mixed up
      with the new ones.
  """
  if output.suffix in ('.npz', '.png'):
    workdir.create(output.parent)
    if output.is_dir():
      raise errors.UserError(f'{output} is a folder')
    return
  workdir.create(output)
  others = {p.name for p in output.glob('*.png')} - set(names(count))
  if others:
    raise errors.UserError(
      f'{output} holds other images, such as {min(others)}: name another '
      '--output'
    )


def save(
  output: pathlib.Path, batches: Iterator[np.ndarray], count: int
) -> None:
  """Writes `count` images as PNG files, one grid, or an .npz.

  Of several processes the first one writes; all must draw.
  """
  if not processes.leads():
    for _ in batches:
      pass
    return
  if output.suffix == '.npz':
    images.save_npz(output, gather(batches))
  elif output.suffix == '.png':
    images.save_png(output, images.grid(gather(batches)))
  else:
    name = iter(names(count))
    for batch in batches:
      for image in batch:
        images.save_png(output / next(name), image)
