"""`--mode=sample`: images from the weights of a run."""

import argparse
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import plots
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax import samples
from ddpm_jax.storage import images
from ddpm_jax.storage import logs
from ddpm_jax.storage import outputs

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
  samples.condition_flags(p)


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Draws `--num_samples` images into `--output`.

  Raises:
    UserError: if there is no run in `--workdir`, or `--output` is taken.
  """
  samples.settle(args)
  seed = config.seed if args.seed is None else args.seed
  ending = '' if recipe.image_size(config) else '.npz'
  if args.output:
    if ending and outputs.kind(args.output) != ending:
      raise errors.UserError(f'--output={args.output}: points go into an .npz')
    outputs.prepare(args.output)
  wanted, told = samples.asked(config, args)
  count = args.num_samples * max(len(wanted), 1)
  mesh = build.mesh(config)
  draw = runs.sampler(config, mesh, count, seed)
  kind, step, params = runs.restore(config, mesh, args.workdir)
  about = samples.description(config, args, kind, step, wanted)
  name = f'samples_{samples.settings(config, kind, step, seed, wanted)}{ending}'
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
    return plots.labelled(tiles, labels=wanted)

  drawn = (image for image, _ in draw(params, told))
  outputs.save(output, drawn, count, about, picture=picture)
  if len(wanted) > 1:
    logs.say(
      f'{args.num_samples} of each of {len(wanted)} in turn, from '
      f'{wanted[0]!r} to {wanted[-1]!r}'
    )
  logs.say(f'{count} images: {output}')
