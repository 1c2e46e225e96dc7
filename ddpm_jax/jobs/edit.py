"""`--mode=edit`: images made of an image, by the weights of a run.

With `--mask` a part of it is made anew (RePaint), with `--to` it turns into
another image, and with neither it is varied (SDEdit).
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import inputs
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax import samples
from ddpm_jax import sampling
from ddpm_jax.data import decode
from ddpm_jax.diffusion import editing
from ddpm_jax.diffusion import pixels
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.storage import logs
from ddpm_jax.storage import outputs

JOB = command.Job('makes images of an image', processes=True)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.num_samples(p, 'images to make (default: 64; of a prompt, 8)')
  command.output(
    p, 'where images go, as for --mode=sample; default: a folder in --workdir'
  )
  samples.condition_flags(p)
  p.add_argument(
    '--image',
    type=command.local_path,
    metavar='FILE',
    help='the image to make others of',
  )
  p.add_argument(
    '--mask',
    type=command.local_path,
    metavar='FILE',
    help='white where --image is made anew, black where it is kept; of its '
    'size',
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
    help='without --mask: the noise that --image is given first, as a part of '
    'T; from 0 (it is kept) to 1 (it is forgotten); default: 0.5',
  )


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Makes `--num_samples` images of `--image` into `--output`.

  Raises:
    UserError: if there is no run in `--workdir`, or flags or files do not fit.
  """
  samples.settle(args)
  check_flags(args)
  if not recipe.image_size(config):
    raise errors.UserError('--mode=edit is of images, and this run of points')
  wanted, condition = samples.asked(config, args)
  if len(wanted) > 1:
    raise errors.UserError('--mode=edit takes one --prompt or --label')
  if args.output:
    outputs.prepare(args.output)
  seed = config.seed if args.seed is None else args.seed
  draw, what = editor(config, args, seed)
  run = runs.load(config, args.workdir, seed=seed)
  drawn = runs.in_batches(config, run.mesh, args.num_samples, draw, 'the edit')
  about = description(config, args, run.weights, run.step, wanted)
  settings = samples.settings(config, run.weights, run.step, seed, wanted)
  name = f'{edit_name(args)}_{settings}'
  output = args.output or args.workdir / f'edited_{name}'
  outputs.check(output, args.num_samples, about)
  logs.say(f'{what}, with the {run.weights} weights of step {run.step}')
  batches = (batch.images for batch in drawn(run.params, condition))
  outputs.save(output, batches, args.num_samples, about)
  logs.say(f'{args.num_samples} images: {output}')


def description(
  config: ConfigDict,
  args: argparse.Namespace,
  kind: str,
  step: int,
  wanted: list[str],
) -> outputs.About:
  """How images are made, to be kept beside them."""
  about = samples.description(config, args, kind, step, wanted)
  about.pop('order', None)  # All are of one prompt or label.
  for flag in ('image', 'mask', 'to'):
    if path := getattr(args, flag):
      about[flag] = str(path.resolve())
  if args.mask:
    return about | {'edit': dict(config.edit)}
  if args.to:
    about['order'] = f'image i is of λ = i / {args.num_samples - 1}'
  return about | {'strength': strength_of(args)}


def edit_name(args: argparse.Namespace) -> str:
  """What is done to which image, as a part of a file's name."""
  if args.mask:
    return f'{args.image.stem}_{args.mask.stem}'
  if args.to:
    return f'{args.image.stem}_{args.to.stem}_strength{strength_of(args):g}'
  return f'{args.image.stem}_strength{strength_of(args):g}'


def strength_of(args: argparse.Namespace) -> float:
  return 0.5 if args.strength is None else args.strength


def check_flags(args: argparse.Namespace) -> None:
  if not args.image:
    raise errors.UserError('--mode=edit makes images of one: name an --image')
  if args.mask and args.to:
    raise errors.UserError('--mask and --to are two edits: name one of them')
  if args.mask and args.strength is not None:
    raise errors.UserError(
      '--strength is not for --mask, where all that is not kept is made anew'
    )
  if args.to and args.num_samples < 2:
    raise errors.UserError('--to needs --num_samples of 2 or more: the ends')


def editor(
  config: ConfigDict, args: argparse.Namespace, seed: int
) -> tuple[Callable, str]:
  """(params, rows) -> `sampling.Drawn`, and what it does, in words.

  The rows are those of `sampling.sampler`.
  """
  height, width, channels = recipe.shape(config)
  shape = height, width, channels
  image = inputs.opened('image', args.image)
  most = config.data.max_value
  x0 = pixels.to_float(inputs.fitted(args.image, image, shape, most))
  if args.mask:
    mask = inputs.opened('mask', args.mask)
    if mask.size != image.size:
      raise errors.UserError(
        f'--mask={args.mask} is {inputs.written(mask)}, and '
        f'--image={args.image} {inputs.written(image)}: they must be of one '
        'size'
      )
    # Of a mask the larger half is white, whatever the model's images are.
    white = decode.probe_image(mask)
    anew = decode.fit(mask, (height, width, 1), white) > 127
    if anew.all() or not anew.any():
      raise errors.UserError(
        f'--mask={args.mask} is all {"white" if anew.all() else "black"}: '
        'white is made anew, and black is kept'
      )
    return inpainted(config, seed, x0, anew)
  strength = strength_of(args)
  if args.to:
    other = inputs.fitted(args.to, inputs.opened('to', args.to), shape, most)
    other = pixels.to_float(other)
    return between(config, seed, x0, other, strength, args.num_samples)
  return varied(config, seed, x0, strength)


def inpainted(
  config: ConfigDict, seed: int, x0: jax.Array, mask: np.ndarray
) -> tuple[Callable, str]:
  """What the mask (H, W, 1) is true of is made anew, the rest is kept."""
  p = build.sampler(config)
  times = build.call(editing.jumps, config.edit, p.schedule.T, of='edit')
  step = editing.inpaint(p.step, x0, jnp.asarray(mask))

  def draw(params: Any, rows: Any) -> sampling.Drawn:
    index, condition = sampling.index_and_condition(rows)
    keys, x_T = sampling.noise(config, seed, index)
    denoiser = p.denoiser(params, condition)
    sampled = samplers.sample(step, denoiser, keys, x_T, times=times)
    return sampling.drawn(config, sampled)

  share = f'{np.count_nonzero(mask)} of {mask.size} pixels'
  what = f'making {share} anew, in {len(times)} steps'
  if config.edit.resample > 1 and len(times) == p.schedule.T:
    what += (
      f' (each once: edit.jump={config.edit.jump} is not below '
      f'sampler.steps={p.schedule.T})'
    )
  return draw, what


def varied(
  config: ConfigDict, seed: int, x0: jax.Array, strength: float
) -> tuple[Callable, str]:
  """x_t of the image, and from there another way down (Meng et al. 2022)."""
  p = build.sampler(config)
  t, time = level(config, p.schedule, strength)

  def draw(params: Any, rows: Any) -> sampling.Drawn:
    index, condition = sampling.index_and_condition(rows)
    keys, eps = sampling.noise(config, seed, index)
    x_t = jax.vmap(process.q_sample, (None, None, None, 0))(
      p.schedule, x0, jnp.array(t), eps
    )
    denoiser = p.denoiser(params, condition)
    times = range(t, 0, -1)
    sampled = samplers.sample(p.step, denoiser, keys, x_t, times=times)
    return sampling.drawn(config, sampled)

  return draw, f'varying the image from t = {time} down, in {t} steps'


def between(
  config: ConfigDict,
  seed: int,
  x0: jax.Array,
  other: jax.Array,
  strength: float,
  count: int,
) -> tuple[Callable, str]:
  """Image i is of λ = i / (count - 1), all of one noise  (section 4.4).

  The paper keeps the noise over λ too; one ε for both ends is our choice, see
  `editing.interpolate`.
  """
  p = build.sampler(config)
  t, time = level(config, p.schedule, strength)
  mix = jax.vmap(editing.interpolate, (None, None, None, None, 0, 0))

  def draw(params: Any, rows: Any) -> sampling.Drawn:
    index, condition = sampling.index_and_condition(rows)
    keys, eps = sampling.noise(config, seed, jnp.zeros_like(index))
    weight = index / (count - 1)
    x_t = mix(p.schedule, x0, other, jnp.array(t), weight, eps)
    denoiser = p.denoiser(params, condition)
    times = range(t, 0, -1)
    sampled = samplers.sample(p.step, denoiser, keys, x_t, times=times)
    return sampling.drawn(config, sampled)

  return draw, f'mixing the images at t = {time}, {t} steps each'


def level(
  config: ConfigDict, schedule: schedules.Schedule, strength: float
) -> tuple[int, int]:
  """The first step whose time is not below strength · T, and that time."""
  times = np.asarray(schedule.time)
  t = int(np.searchsorted(times, strength * config.schedule.T))
  t = min(max(t, 1), schedule.T)
  return t, int(times[t])
