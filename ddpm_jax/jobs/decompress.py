"""`--mode=decompress`: images of what `--mode=compress` wrote, or a part."""

import argparse
import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import ranges
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax.compression import file_format
from ddpm_jax.compression import transmission
from ddpm_jax.parallel import meshes
from ddpm_jax.storage import logs
from ddpm_jax.storage import outputs

JOB = command.Job('shows images that --mode=compress wrote', devices='one')


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.output(p, 'where images go, as for --mode=sample')
  p.add_argument(
    '--input', type=command.path, metavar='FILE', help='what was compressed'
  )
  p.add_argument(
    '--bytes', type=int, metavar='N', help='of --input, take the first N'
  )


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Writes the images of `--input` to `--output`, a folder, .png or .npz.

  Raises:
    UserError: if there is no run in `--workdir`; or `--input` is not of it, is
      damaged, or does not hold a single step.
  """
  if args.input is None or args.output is None:
    raise errors.UserError(
      'name what to decompress and where to, as --input=FILE --output=FOLDER'
    )
  if args.bytes is not None and args.bytes < 0:
    raise errors.UserError(f'--bytes={args.bytes} is below 0')
  path = args.input
  data = read_bytes(path)[: args.bytes]
  with of_file(path):
    header, _ = file_format.read_header(data)
  outputs.prepare(args.output)
  mesh = meshes.make_mesh(1)
  kind, step, params = runs.restore(config, mesh, args.workdir)
  check_same(config, params, header, path)
  about = {
    'mode': args.mode,
    'run': str(args.workdir.resolve()),
    'step': step,
    'weights': kind,
    'input': str(path.resolve()),
    'bytes': len(data),
  }
  outputs.check(args.output, header['images'], about)
  config = config.copy_and_resolve_references()
  config.codec.update(header['codec'])
  with of_file(path):
    ranges.check(recipe.flatten(config))
    read, whole = file_format.read(
      data, transmission.rules(config, header['squares'])
    )
  done, shown, _ = transmission.receive(config, params, read)
  steps = header['codec']['steps']
  outputs.save(args.output, iter([shown]), len(shown), about)
  used = f'the first {done} of {steps} steps, ' if done < steps else ''
  if not whole:
    logs.say(f'{path} is cut off: {used}{read.ends[done]} bytes, are shown')
  logs.say(f'{len(shown)} images: {args.output}')


@contextlib.contextmanager
def of_file(path: pathlib.Path) -> Iterator[None]:
  """Names the file in what is said to be wrong with it."""
  try:
    yield
  except errors.UserError as e:
    raise errors.UserError(f'{path}: {e}') from None


def read_bytes(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as e:
    raise errors.UserError(f'--input={path}: {e.strerror}') from None


def check_same(
  config: ConfigDict, params: Any, header: dict[str, Any], path: pathlib.Path
) -> None:
  """Refuses a file of another model, and warns of one of other software.

  Raises:
    UserError: saying which.
  """
  shape = list(recipe.shape(config))
  if header['shape'] != shape:
    raise errors.UserError(
      f'{path} is of images {transmission.describe(header["shape"])}, and '
      f'this run is of images {transmission.describe(shape)}: name its own '
      '--workdir'
    )
  if header['model'] != transmission.model_digest(config, params):
    raise errors.UserError(
      f'{path} was written with other weights than the newest in this workdir: '
      'name the --workdir that it was compressed with'
    )
  here, there = transmission.software(), header['software']
  others = [
    f'{k} {errors.short(there.get(k, "unknown"))} -> {v}'
    for k, v in here.items()
    if there.get(k) != v
  ]
  if others:
    logs.say(
      f'{path} was written with other software ({", ".join(others)}): its '
      'numbers may differ, and if they do you will be told'
    )
