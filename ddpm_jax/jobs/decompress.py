"""`--mode=decompress`: decodes a file of `--mode=compress`, or a prefix."""

import argparse
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import run as runs
from ddpm_jax.compression import compressed
from ddpm_jax.compression import transmission
from ddpm_jax.parallel import meshes
from ddpm_jax.storage import logs
from ddpm_jax.storage import outputs

JOB = command.Job('decodes the images of --mode=compress', devices='one')


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.output(p, 'where to write the images, as for --mode=sample')
  p.add_argument(
    '--input', type=command.path, metavar='FILE', help='the compressed file'
  )
  p.add_argument(
    '--bytes', type=int, metavar='N', help='use the first N bytes of --input'
  )


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Writes the images of `--input` to `--output`, a folder, .png or .npz.

  Raises:
    UserError: If there is no run in `--workdir`; or `--input` is from another
      run, is damaged, or does not hold even one step.
  """
  if args.input is None or args.output is None:
    raise errors.UserError(
      'set what to decompress and where to write it, such as --input=FILE '
      '--output=FOLDER'
    )
  if args.bytes is not None and args.bytes < 0:
    raise errors.UserError(f'--bytes={args.bytes} is below 0')
  path = args.input
  data, header = compressed.opened(path, args.bytes)
  outputs.prepare(args.output)
  mesh = meshes.make_mesh(1)
  kind, step, params = runs.restore(config, mesh, args.workdir)
  compressed.check_same(config, params, header, path)
  about = {
    'mode': args.mode,
    'run': str(args.workdir.resolve()),
    'step': step,
    'weights': kind,
    'input': str(path.resolve()),
    'bytes': len(data),
  }
  outputs.check(args.output, header['images'], about)
  config, read, whole = compressed.decoded(config, data, header, path)
  done, shown, _ = transmission.receive(config, params, read)
  steps = header['codec']['steps']
  outputs.save(args.output, iter([shown]), len(shown), about)
  used = f'the first {done} of {steps} steps, ' if done < steps else ''
  if not whole:
    logs.say(f'{path} is cut off: {used}{read.ends[done]} bytes, are decoded')
  logs.say(f'{len(shown)} images: {args.output}')
