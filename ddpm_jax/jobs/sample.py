"""`--mode=sample`: draws images with the weights of a run."""

import argparse
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import drawing
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import plots
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax import samples
from ddpm_jax.storage import images
from ddpm_jax.storage import logs
from ddpm_jax.storage import outputs

JOB = command.Job('draws images with the weights of a run', processes=True)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.num_samples(p, 'images to draw (default: 64, or 8 of each prompt)')
  command.output(
    p,
    'where to write images: a folder (one PNG per image), a .png (one grid) or '
    'an .npz (uint8 NHWC, `images`); default: a folder in --workdir, named '
    'after the settings',
  )
  samples.condition_flags(p)


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Draws `--num_samples` images into `--output`.

  Raises:
    UserError: If there is no run in `--workdir`, or `--output` holds other
      images.
  """
  samples.settle(args)
  ending = '' if recipe.image_size(config) else '.npz'
  if args.output:
    if ending and outputs.kind(args.output) != ending:
      raise errors.UserError(f'--output={args.output}: points go into an .npz')
    outputs.prepare(args.output)
  wanted, condition = samples.asked(config, args)
  count = args.num_samples * max(len(wanted), 1)
  run = runs.load(config, args.workdir, seed=args.seed)
  draw = drawing.sampler(config, run.engine, count)
  about = samples.description(config, args, run.weights, run.step, wanted)
  settings = samples.settings(config, run.weights, run.step, run.seed, wanted)
  name = f'samples_{settings}{ending}'
  output = args.output or args.workdir / name
  outputs.check(output, count, about)
  logs.say(
    f'drawing {count} images with the {run.weights} weights of step '
    f'{run.step}, {config.sampler.steps} steps of {config.sampler.name} each'
  )

  def picture(drawn: np.ndarray) -> np.ndarray:
    if not wanted or args.num_samples > 32:
      return images.grid(drawn)
    tiles = drawn.reshape(len(wanted), -1, *recipe.shape(config))
    return plots.labelled(tiles, labels=wanted)

  drawn = (image for image, _ in draw(run.params, condition, seed=run.seed))
  outputs.save(output, drawn, count, about, picture=picture)
  if len(wanted) > 1:
    logs.say(
      f'{args.num_samples} of each of {len(wanted)}, in order from '
      f'{wanted[0]!r} to {wanted[-1]!r}'
    )
  logs.say(f'{count} images: {output}')
