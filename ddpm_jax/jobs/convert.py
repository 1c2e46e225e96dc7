"""`--mode=convert`: imports weights of other programs, and exports runs."""

import argparse
import pathlib
import shlex
import shutil
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import exported
from ddpm_jax import flags as command
from ddpm_jax import pretrained
from ddpm_jax import recipe
from ddpm_jax.interop import card
from ddpm_jax.interop import hub
from ddpm_jax.storage import logs

JOB = command.Job(
  'imports a diffusers model as a run, or exports a run to diffusers',
  run=False,
  recipe=False,
)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  p.add_argument(
    '--output',
    type=command.typed(output),
    help='the new folder: a workdir (with --input), or a diffusers folder '
    '(with --workdir); or hf://USER/NAME, to upload that folder to the Hugging '
    'Face Hub',
  )
  p.add_argument(
    '--input',
    type=command.name_or_path,
    metavar='MODEL',
    help='a diffusers folder, its name on huggingface.co, or a .ckpt of '
    'pytorch_diffusion (with --config)',
  )
  p.add_argument(
    '--license',
    type=command.typed(card.license_id),
    metavar='ID',
    help='license in the model card of the diffusers folder, such as mit '
    '(default: left to fill in)',
  )


def output(text: str) -> pathlib.Path | str:
  """Returns the path of `--output`, or hf://USER/NAME as it is.

  Raises:
    UserError: It is neither.
  """
  if text.lower().startswith('hf:'):
    return hub.SCHEME + hub.parse(text)
  return command.path(text)


def run(config: ConfigDict | None, args: argparse.Namespace) -> None:
  """Imports `--input` as the workdir `--output`, or exports `--workdir`.

  Raises:
    UserError: The flags, a file or the model are not valid.
    RunError: The model was not uploaded.
  """
  del config
  if not args.output or bool(args.input) == bool(args.workdir):
    raise errors.UserError(
      'convert takes --input=FOLDER --output=WORKDIR, or, to go back, '
      '--workdir=WORKDIR --output=FOLDER'
    )
  name = ''
  if isinstance(args.output, str):
    name, folder = hub.parse(args.output), hub.staging(args.output)
    if args.input:
      raise errors.UserError(
        f'--output={args.output} is for --workdir=RUN: an import needs a folder'
      )
    hub.load(name)
    args.output = folder
  if args.input and args.license:
    raise errors.UserError('--license is for an exported model: leave it out')
  if args.output.exists() and (
    not args.output.is_dir() or any(args.output.iterdir())
  ):
    again = f'upload it with `{hub.upload_command(name, args.output)}`, or '
    raise errors.UserError(
      f'{args.output} exists already: '
      + (f'{again}remove it' if name else 'name a new folder as --output')
    )
  if args.input:
    import_run(args)
  else:
    export_run(args, name)


def import_run(args: argparse.Namespace) -> None:
  """Writes a workdir at step 0, with the weights as its EMA weights too."""
  name = args.input.removeprefix(hub.SCHEME)
  model = pretrained.read(name, args.config, args.changes)
  pretrained.save_new(model, args.output, source=str(args.input))
  data = model.config.data
  logs.say(f'{model.size:,} parameters of {model.path}: {args.output}')
  logs.say(
    f'data to evaluate and train on: data.name={data.name}, data.path='
    f'{data.path!r}; to change them, name others with --config.data'
  )
  logs.say('to sample from it:')
  logs.say(
    '  python -m ddpm_jax.main --mode=sample --num_samples=64 '
    f'--workdir={shlex.quote(str(args.output))}'
  )


def export_run(args: argparse.Namespace, name: str) -> None:
  """Writes the weights of a run as a diffusers folder with a model card.

  Args:
    args: The flags.
    name: USER/NAME on the Hub to upload it to; '' for none.
  """
  config = exported.recipe_of(args.workdir, args.config, args.changes)
  what = exported.write(
    *(config, args.workdir, args.output),
    name=name,
    license=args.license or card.UNKNOWN,
  )
  where = str(args.output)
  if name:
    logs.say(f'uploading {what}')
    where = hub.push(args.output, name, f'{what[0].upper()}{what[1:]}')
    shutil.rmtree(args.output)
  logs.say(f'{what}, with a model card: {where}')
  if not args.license:
    logs.say(f'to fill in: the license, at the top of its {card.NAME}')
  logs.say('to sample from it, in Python:')
  snippet = card.snippet(recipe.flatten(config), name or args.output)
  for line in snippet.splitlines():
    logs.say(f'  {line}')
