"""`--mode=edit`: edits an image with the weights of a run.

With `--mask` part of it is drawn again (RePaint), with `--to` it turns into
another image, with `--invert` it is drawn from its x_T (DDIM inversion), and
without these it is varied (SDEdit).
"""

import argparse
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import drawing
from ddpm_jax import edits
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax import samples
from ddpm_jax.storage import logs
from ddpm_jax.storage import outputs

JOB = command.Job('edits an image', processes=True)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.num_samples(
    p, 'images to draw (default: 64; with a prompt 8; with --invert alone 1)'
  )
  command.output(
    p, 'where images go, as for --mode=sample; default: a folder in --workdir'
  )
  samples.condition_flags(p)
  p.add_argument(
    '--image',
    type=command.local_path,
    metavar='FILE',
    help='the image to edit',
  )
  p.add_argument(
    '--mask',
    type=command.local_path,
    metavar='FILE',
    help='white where --image is drawn again, black where it is kept; of the '
    'same size',
  )
  p.add_argument(
    '--to',
    type=command.local_path,
    metavar='FILE',
    help='the image that --image turns into',
  )
  p.add_argument(
    '--strength',
    type=float,
    metavar='S',
    help='without --mask: the noise that is first added to --image, t / T; '
    'from 0 (the image is kept) to 1 (it is forgotten); default: 0.5',
  )
  p.add_argument(
    '--invert',
    action='store_true',
    help='draw from the x_T that DDIM maps to --image: with --prompt or '
    '--label for another one of them, with --to for images between the two',
  )


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Draws `--num_samples` edits of `--image` into `--output`.

  Raises:
    UserError: If there is no run in `--workdir`, or a flag or a file is not
      valid.
  """
  if args.invert:
    config = by_ddim(config, args)
  samples.settle(args)
  asked, count = request(args), args.num_samples
  if not recipe.image_size(config):
    raise errors.UserError(
      '--mode=edit is for images, and this is a run of points'
    )
  wanted, condition = samples.asked(config, args)
  if len(wanted) > 1:
    raise errors.UserError('--mode=edit takes one --prompt or --label')
  if args.output:
    outputs.prepare(args.output)
  draw, what = asked.make(config, count)
  run = runs.load(config, args.workdir, seed=args.seed)
  drawn = drawing.in_batches(config, run.engine, count, draw, 'the edit')
  about = samples.description(config, args, run.weights, run.step, wanted)
  about.pop('order', None)  # All are of one prompt or label.
  about |= asked.about(config, count)
  settings = samples.settings(config, run.weights, run.step, run.seed, wanted)
  output = args.output or args.workdir / f'edited_{asked.name}_{settings}'
  outputs.check(output, count, about)
  logs.say(f'{what}, with the {run.weights} weights of step {run.step}')
  batches = (x.images for x in drawn(run.params, condition, seed=run.seed))
  outputs.save(output, batches, count, about)
  logs.say(f'{count} images: {output}')


def request(args: argparse.Namespace) -> edits.Request:
  """Returns the edit that the flags ask for.

  Raises:
    UserError: If they exclude each other, or one is missing.
  """
  if not args.image:
    raise errors.UserError('--mode=edit edits an image: name an --image')
  if args.mask and args.to:
    raise errors.UserError('--mask and --to are two edits: name one of them')
  if args.mask and args.strength is not None:
    raise errors.UserError(
      '--strength is not for --mask, where all that is not kept is drawn again'
    )
  if args.to and args.num_samples < 2:
    raise errors.UserError('--to needs --num_samples of 2 or more: the ends')
  strength = {} if args.strength is None else {'strength': args.strength}
  return edits.Request(
    *(args.image, args.mask, args.to), invert=args.invert, **strength
  )


def by_ddim(config: ConfigDict, args: argparse.Namespace) -> ConfigDict:
  """The recipe with the sampler of `--invert`.

  Raises:
    UserError: If another one is named, or with a flag of another edit.
  """
  for flag in ('mask', 'strength'):
    if getattr(args, flag) is not None:
      raise errors.UserError(f'--invert and --{flag} are two edits: name one')
  named = args.changes.get('sampler.name', 'ddim')
  if named != 'ddim' or config.sampler.eta:
    raise errors.UserError(
      '--invert is for DDIM: leave out config.sampler.name, and '
      'config.sampler.eta'
    )
  asked = args.prompt or args.prompts or args.label or args.to
  if not asked and args.num_samples is None:
    args.num_samples = 1  # all would be the same
  keys: dict[str, Any] = {'sampler.name': 'ddim'}
  if 'sampler.clip' not in args.changes:
    keys['sampler.clip'] = False  # Clipping cannot be inverted.
  return recipe.changed_copy(config, keys)
