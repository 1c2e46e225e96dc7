"""`--mode=convert`: other people's weights to a run, and a run to theirs."""

import argparse
import functools
import math
import pathlib
import shlex
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax import validate
from ddpm_jax.data import pipeline
from ddpm_jax.interop import diffusers
from ddpm_jax.interop import fields
from ddpm_jax.interop import files
from ddpm_jax.parallel import engines
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage import lock
from ddpm_jax.storage import logs
from ddpm_jax.storage import paths
from ddpm_jax.storage import workdir

# The recipe of an imported model makes itself.
# What a model comes with and may yet be trained or sampled without.
ADVICE = ('model.dropout', 'sampler.clip', 'loss.name')

JOB = command.Job(
  'turns weights of diffusers into a run, or back', run=False, recipe=False
)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.output(p, 'the new folder: a workdir, or one for diffusers')
  p.add_argument(
    '--input',
    type=command.name_or_path,
    metavar='MODEL',
    help='a folder of diffusers, its name on huggingface.co, or a .ckpt of '
    'pytorch_diffusion (with --config)',
  )


def run(config: ConfigDict | None, args: argparse.Namespace) -> None:
  """Turns `--input` into the workdir `--output`, or `--workdir` into a folder
  `--output` for diffusers.

  Raises:
    UserError: if the flags, a file or the model do not do.
  """
  del config
  if not args.output or bool(args.input) == bool(args.workdir):
    raise errors.UserError(
      'convert takes --input=FOLDER --output=WORKDIR, or, to go back, '
      '--workdir=WORKDIR --output=FOLDER'
    )
  if args.output.exists() and (
    not args.output.is_dir() or any(args.output.iterdir())
  ):
    raise errors.UserError(
      f'{args.output} is there already: name a new folder as --output'
    )
  if args.input:
    take_in(args)
  else:
    give_out(args)


def take_in(args: argparse.Namespace) -> None:
  """Writes a workdir at step 0: EMA = weights, a fresh optimiser, all data."""
  path = files.locate(args.input)
  if path.is_dir():
    model = files.read_model(path)
    keys = fields.to_recipe(model.unet, model.scheduler)
    weights, names = model.weights, diffusers.DIFFUSERS
    rows = model.unet.get('num_class_embeds')
  else:
    if not args.config:
      raise errors.UserError(
        f'{path} says nothing of its recipe: name one, as '
        '--config=configs/cifar.py'
      )
    keys, weights, names = {}, path, diffusers.PYTORCH_DIFFUSION
    rows = None
  config = recipe_of(args, keys)
  if rows:
    set_classes(config, args, rows)
  validate.check(config)
  validate.unread(config, args.changes, args.changes)
  if config.model.name != 'unet' or (config.condition.name and not rows):
    raise errors.UserError(
      f'{path} is a U-Net without a condition, which {args.config} is not'
    )
  tensors = files.read_tensors(weights)
  check_depth(config, len(tensors), weights)
  mesh = build.mesh(config)
  abstract = jax.eval_shape(functools.partial(build.init_state, config))
  params = diffusers.to_params(abstract.params, tensors, names)
  workdir.check(args.output)
  with lock.held(args.output):
    workdir.mark_imported(args.output, str(args.input))
    save(config, mesh, params, args.output)
  count = sum(math.prod(x.shape) for x in tensors.values())
  logs.say(f'{count:,} parameters of {weights}: {args.output}')
  data = config.data
  logs.say(
    f'its data, to evaluate and to train on: data.name={data.name}, data.path='
    f'{data.path!r}; others are to be named here'
  )
  again = shlex.quote(str(args.output))
  logs.say('to draw from it:')
  logs.say(
    '  python -m ddpm_jax.main --mode=sample --num_samples=64 '
    f'--workdir={again}'
  )


def check_depth(config: ConfigDict, count: int, path: pathlib.Path) -> None:
  """Refuses a network of far more layers than a file has tensors for.

  To build it would take as long as it is deep.

  Raises:
    UserError: naming the key.
  """
  c = config.model
  blocks = len(c.multipliers) * (2 * c.blocks + 1)
  if 2 * blocks > count:  # A block has ten, or five if it is small.
    raise errors.UserError(
      f'{path} holds {count} tensors, too few for {blocks} blocks: '
      f'config.model.blocks={c.blocks} (layers_per_block) is of another network'
    )


def recipe_of(args: argparse.Namespace, keys: dict[str, Any]) -> ConfigDict:
  """The recipe of --config, or of the nearest size, with the model's keys.

  Raises:
    UserError: if --config.KEY=VALUE contradicts the model.
  """
  if args.config:
    config = recipe.load(args.config)
  else:
    like = (keys['data.image_size'], keys['data.channels'])
    nearest = {(32, 3): 'cifar', (256, 3): 'celebahq'}
    config = recipe.shipped(nearest.get(like, 'folder'))
    config.data.path = ''  # not named: the model may be of any data
  config.update_from_flattened_dict(keys)
  recipe.override(config, args.changes)
  flat = recipe.flatten(config)
  for key, value in keys.items():
    if key not in ADVICE and flat[key] != value:
      raise errors.UserError(
        f'config.{key} is {value!r} in {args.input}: leave '
        f'--config.{key}={flat[key]} out'
      )
  return config


def set_classes(
  config: ConfigDict, args: argparse.Namespace, rows: int
) -> None:
  """Checks `condition.classes` against the rows of a class embedding.

  Raises:
    UserError: if it does not say whether the last row is a class.
  """
  classes = config.condition.classes
  if classes not in (rows - 1, rows):
    raise errors.UserError(
      f'{args.input} has num_class_embeds={rows}: set '
      f'--config.condition.classes={rows} if each is a class, or '
      f'={rows - 1} if the last one stands for no class, as in a model that '
      '--mode=convert wrote'
    )
  if classes == rows and 'condition.drop' not in args.changes:
    config.condition.drop = 0.0
    logs.say(
      'the model was trained without "no class": condition.drop=0, and '
      'guidance is not for it'
    )


def save(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  params: Any,
  folder: pathlib.Path,
) -> None:
  """A run that has not made a step; `config.json`, which makes it one, last."""
  begin = functools.partial(build.begin, config)
  state = engines.init_state(begin, mesh, params)
  checkpoints = checkpoint.open(folder / 'checkpoints')
  try:
    checkpoint.save(
      checkpoints,
      0,
      state=checkpoint.trained(state),
      ema=state.ema_params,
      data=pipeline.position(0),
      config=recipe.to_json(config),
    )
  finally:
    checkpoint.close(checkpoints)
  workdir.write_config(folder, recipe.to_json(config))


def give_out(args: argparse.Namespace) -> None:
  """Writes the weights of a run as diffusers does."""
  if paths.is_remote(args.output):
    raise errors.UserError(
      f'--output={args.output}: safetensors writes to this machine alone: '
      'name a folder of it, and copy that'
    )
  workdir.check_run(args.workdir)
  config = recipe.resolve(args.config, args.workdir, args.changes)
  if not args.config and not any(
    k.startswith('parallel') for k in args.changes
  ):
    config = validate.fit_devices(config, trains=False)
  validate.check(config)
  beta = np.asarray(build.schedule(config).beta[1:]).tolist()
  unet, scheduler = fields.from_recipe(recipe.flatten(config), beta)
  mesh = build.mesh(config)
  workdir.create(args.output)
  kind, step, params = runs.restore(config, mesh, args.workdir)
  tensors = diffusers.from_params(jax.device_get(params), diffusers.DIFFUSERS)
  rows = unet['num_class_embeds']
  if rows:
    tensors[diffusers.CLASSES] = tensors[diffusers.CLASSES][:rows]
  files.write_model(args.output, unet, scheduler, tensors)
  logs.say(f'the {kind} weights of step {step}: {args.output}')
  logs.say('to draw from it, in Python:')
  for line in advice(config, args.output).splitlines():
    logs.say(f'  {line}')


def advice(config: ConfigDict, folder: pathlib.Path) -> str:
  """Python that draws from an exported model."""
  pipeline = f'diffusers.DDPMPipeline.from_pretrained({str(folder)!r})'
  if not config.condition.name:
    return f'{pipeline}(num_inference_steps={config.schedule.T}).images[0]'
  # DDPMPipeline gives its network no labels.
  classes, drop = config.condition.classes, config.condition.drop
  height, width, channels = recipe.shape(config)
  # Guidance leaves the variance as it is.
  learned = config.sampler.variance == 'learned_range'
  part = f'[:, :{channels}]' if learned else ''
  guided = f"""\
  # With guidance w, also:
  # none = torch.full_like(labels, {classes})
  # without = unet(x, t, class_labels=none).sample
  # out{part} += (w - 1) * (out - without){part}
"""
  return f"""\
import diffusers, torch
torch.set_grad_enabled(False)
pipeline = {pipeline}
unet, scheduler = pipeline.unet, pipeline.scheduler
labels = torch.arange({classes})  # one an image\
{f'; {classes} is no class' if drop else ''}
x = torch.randn(len(labels), {channels}, {height}, {width})
for t in scheduler.timesteps:
  out = unet(x, t, class_labels=labels).sample
{guided if drop else ''}\
  x = scheduler.step(out, t, x).prev_sample
images = (x / 2 + 0.5).clamp(0, 1)  # (N, C, H, W)
"""
