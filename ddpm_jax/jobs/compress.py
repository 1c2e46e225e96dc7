"""`--mode=compress`: images as one file that can be cut off anywhere."""

import argparse
import math
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import inputs
from ddpm_jax import run as runs
from ddpm_jax.compression import transmission
from ddpm_jax.parallel import meshes
from ddpm_jax.storage import logs
from ddpm_jax.storage import paths
from ddpm_jax.storage import workdir

JOB = command.Job(
  'writes images as one file that can be cut off', devices='one'
)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.output(p, 'the file to write')
  p.add_argument(
    '--images',
    type=command.local_path,
    metavar='PATH',
    help='what to compress: a folder, an .npz or an image',
  )


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Writes `--images` to `--output`, and prints what they take.

  Raises:
    UserError: if there is no run in `--workdir`, there are no images, or
      `--output` cannot be written.
  """
  if args.images is None or args.output is None:
    raise errors.UserError(
      'name what to compress and where to, as --images=FOLDER --output=FILE'
    )
  if args.output.is_dir():
    raise errors.UserError(f'--output={args.output} is a folder: name a file')
  x0 = inputs.read(args.images, config)
  workdir.create(args.output.parent)
  seed = config.seed if args.seed is None else args.seed
  mesh = meshes.make_mesh(1)
  kind, step, params = runs.restore(config, mesh, args.workdir)
  n, S = len(x0), config.codec.steps
  k = math.ceil(n / config.codec.batch_size)
  logs.say(
    f'{n} images {transmission.describe(x0.shape[1:])} in {S} steps and {k} '
    f'batch(es), with the {kind} weights of step {step}'
  )
  sent = transmission.send(config, params, x0, seed)
  with paths.atomic_write(args.output) as path:
    path.write_bytes(sent.data)
  print(transmission.table(sent, x0))
  logs.say(f'{len(sent.data)} bytes: {args.output}')
