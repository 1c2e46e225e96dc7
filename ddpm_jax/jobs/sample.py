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
from ddpm_jax import errors
from ddpm_jax.runtime import checkpoint
from ddpm_jax.runtime import images
from ddpm_jax.runtime import logs
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime import workdir


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Draws `--num_samples` images into `--output`.

  Raises:
    UserError: if there is no run in `--workdir`, or `--output` is taken.
  """
  check_workdir(args.workdir)
  seed = config.seed if args.seed is None else args.seed
  kind = '' if build.image_size(config) else '.npz'
  output = args.output or args.workdir / f'samples_seed{seed}{kind}'
  if kind and output.suffix != kind:
    raise errors.UserError(f'--output={output}: points go into an .npz')
  check_output(output, args.num_samples)
  build.check(config)
  mesh = build.mesh(config)
  draw = sampler(config, mesh, args.num_samples, seed)
  step, params = restore_ema(config, mesh, args.workdir)
  logs.say(
    f'drawing {args.num_samples} images with the EMA weights of step {step}, '
    f'{config.sampler.steps} steps of {config.sampler.name} each'
  )
  drawn = (image for image, _ in draw(params))
  save(output, drawn, args.num_samples)
  logs.say(f'{args.num_samples} images: {output}')


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
  init = functools.partial(build.init_state, config)
  abstract = parallel.abstract_state(init, mesh).ema_params
  return checkpoint.restore_item(folder / 'checkpoints', 'ema', abstract, step)


def drawer(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  count: int,
  seed: int,
  snapshots: int = 0,
) -> tuple[int, Callable[[Any, int], tuple[np.ndarray, np.ndarray]]]:
  """Compiles the drawing of images in batches, of a size for `count` of them.

  Returns the size b, and a function of the weights and of the index of the
  first image that gives uint8 images (b, H, W, C) and predictions on the way
  (b, K, H, W, C).
  """
  n = mesh.size
  size = math.ceil(min(count, config.sampler.batch_size) / n) * n
  init = functools.partial(build.init_state, config)
  compiled = parallel.compile_map(
    build.sampler(config, seed, snapshots),
    mesh,
    config.parallel.engine,
    jax.eval_shape(init).ema_params,
  )

  def draw(params: Any, start: int) -> tuple[np.ndarray, np.ndarray]:
    index = np.arange(start, start + size, dtype=np.int32)
    return compiled(params, parallel.put(index, mesh, config.parallel.engine))

  return size, draw


def sampler(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  count: int,
  seed: int,
  snapshots: int = 0,
) -> Callable[[Any], Iterator[tuple[np.ndarray, np.ndarray]]]:
  """`drawer` of `count` images in all, batch by batch."""
  size, draw = drawer(config, mesh, count, seed, snapshots)

  def batches(params: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, count, size):
      # The last batch is drawn whole, for one program serves all, and cut.
      drawn, seen = draw(params, start)
      yield drawn[: count - start], seen[: count - start]

  return batches


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
  """Writes `count` images as PNG files, one grid, or an .npz."""
  with logs.progress(count, 0, 'images', show=True) as bar:

    def watched() -> Iterator[np.ndarray]:
      for batch in batches:
        yield batch
        bar.update(len(batch))

    if output.suffix == '.npz':
      images.save_npz(output, gather(watched()))
    elif output.suffix == '.png':
      images.save_png(output, images.grid(gather(watched())))
    else:
      name = iter(names(count))
      for batch in watched():
        for image in batch:
          images.save_png(output / next(name), image)
