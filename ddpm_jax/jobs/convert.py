"""`--mode=convert`: other people's weights to a run, and a run to theirs."""

import argparse
import functools
import pathlib
import shlex
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import pretrained
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax import validate
from ddpm_jax.data import pipeline
from ddpm_jax.interop import diffusers
from ddpm_jax.interop import fields
from ddpm_jax.interop import files
from ddpm_jax.parallel import meshes
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage import lock
from ddpm_jax.storage import logs
from ddpm_jax.storage import paths
from ddpm_jax.storage import workdir

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
  model = pretrained.read(args.input, args.config, args.changes)
  workdir.check(args.output)
  with lock.held(args.output):
    workdir.mark_imported(args.output, str(args.input))
    save(model.config, build.mesh(model.config), model.params, args.output)
  logs.say(f'{model.size:,} parameters of {model.path}: {args.output}')
  data = model.config.data
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


def save(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  params: Any,
  folder: pathlib.Path,
) -> None:
  """A run that has not made a step; `config.json`, which makes it one, last."""
  begin = functools.partial(build.begin, config)
  state = meshes.init_state(begin, mesh, params)
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
