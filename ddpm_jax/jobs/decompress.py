"""`--mode=decompress`: images of what `--mode=compress` wrote, or a part."""

import argparse
import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import ranges
from ddpm_jax import recipe
from ddpm_jax.diffusion import codec
from ddpm_jax.jobs import compress
from ddpm_jax.jobs import sample
from ddpm_jax.runtime import bitstream
from ddpm_jax.runtime import logs
from ddpm_jax.runtime import outputs
from ddpm_jax.runtime import parallel

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
  sample.check_workdir(args.workdir)
  if args.input is None or args.output is None:
    raise errors.UserError(
      'name what to decompress and where to, as --input=FILE --output=FOLDER'
    )
  if args.bytes is not None and args.bytes < 0:
    raise errors.UserError(f'--bytes={args.bytes} is below 0')
  path = args.input
  data = read_bytes(path)[: args.bytes]
  with of_file(path):
    header, _ = bitstream.read_header(data)
  outputs.prepare(args.output)
  mesh = parallel.make_mesh(1)
  kind, step, params = sample.restore(config, mesh, args.workdir)
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
    read, whole = bitstream.read(
      data, compress.rules(config, header['squares'])
    )
  done, shown, _ = receive(config, params, read)
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
      f'{path} is of images {compress.describe(header["shape"])}, and this run '
      f'is of images {compress.describe(shape)}: name its own --workdir'
    )
  if header['model'] != compress.model_digest(config, params):
    raise errors.UserError(
      f'{path} was written with other weights than the newest in this workdir: '
      'name the --workdir that it was compressed with'
    )
  here, there = compress.software(), header['software']
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


def images_of(
  config: ConfigDict, params: Any, data: bytes
) -> tuple[int, np.ndarray, float]:
  """As `receive`, of bytes that this very model and program have written."""
  header, _ = bitstream.read_header(data)
  read, _ = bitstream.read(data, compress.rules(config, header['squares']))
  config = config.copy_and_resolve_references()
  config.codec.update(header['codec'])
  return receive(config, params, read)


def receive(
  config: ConfigDict, params: Any, read: bitstream.Read
) -> tuple[int, np.ndarray, float]:
  """How many steps there are, the uint8 images after them, and the seconds.

  Raises:
    UserError: if what is computed here is not what the sender had.
  """
  header = read.header
  N, size, S = header['images'], config.codec.batch_size, config.codec.steps
  program = compress.compiled(config, params, size, header['seed'])
  begun = time.perf_counter()
  told = codec.Code(
    *(
      np.pad(x, [(0, S - len(x)), *[(0, 0)] * (x.ndim - 1)])
      for x in (read.size, read.chosen)
    )
  )
  black = np.zeros((N, *header['shape']), np.uint8)
  passed = compress.run_batches(
    config, program, params, black, header['squares'], told, False
  )
  seconds = time.perf_counter() - begun
  check, done = compress.check_of(passed.check), 0
  for steps, theirs in read.checks.items():
    if check[steps] != theirs:
      logs.say(
        f'from step {done + 1} on the network computes other numbers here than '
        'where this was compressed; what is shown is from before that'
      )
      break
    done = steps
  if not done and read.checks:
    raise errors.UserError(
      'the network computes other numbers here than where this was '
      'compressed: use the same machine and the same software, '
      + ', '.join(
        f'{errors.short(k)} {errors.short(v)}'
        for k, v in list(header['software'].items())[:4]
      )
    )
  return done, passed.shown[done], seconds
