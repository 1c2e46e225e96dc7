"""`--mode=compress`: images as one file that can be cut off anywhere."""

import argparse
import collections
import importlib.metadata
import math
import pathlib
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import recipe
from ddpm_jax import sampling
from ddpm_jax.data import arrayfile
from ddpm_jax.data import decode
from ddpm_jax.data import listing
from ddpm_jax.data import sources
from ddpm_jax.diffusion import codec
from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import pixels
from ddpm_jax.diffusion import schedules
from ddpm_jax.jobs import edit
from ddpm_jax.jobs import sample
from ddpm_jax.runtime import bitstream
from ddpm_jax.runtime import fingerprint
from ddpm_jax.runtime import images
from ddpm_jax.runtime import logs
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime import workdir


class Sent(NamedTuple):
  """What `send` has done with N images of D dimensions in S steps."""

  data: bytes
  around: int  # bytes of `data` that are header, lengths and checks
  bits: np.ndarray  # (S,), of the code of each step of all images
  nats: np.ndarray  # (S, N), KL(q ‖ p)
  shown: np.ndarray  # (S+1, N, H, W, C) uint8, x̂_0 after so many steps
  time: np.ndarray  # (S+1,), t after so many steps
  seconds: float  # without compiling


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
  sample.check_workdir(args.workdir)
  if args.images is None or args.output is None:
    raise errors.UserError(
      'name what to compress and where to, as --images=FOLDER --output=FILE'
    )
  if args.output.is_dir():
    raise errors.UserError(f'--output={args.output} is a folder: name a file')
  x0 = read(args.images, config)
  workdir.create(args.output.parent)
  seed = config.seed if args.seed is None else args.seed
  mesh = parallel.make_mesh(1)
  kind, step, params = sample.restore(config, mesh, args.workdir)
  n, S = len(x0), config.codec.steps
  k = math.ceil(n / config.codec.batch_size)
  logs.say(
    f'{n} images {describe(x0.shape[1:])} in {S} steps and {k} batch(es), with '
    f'the {kind} weights of step {step}'
  )
  sent = send(config, params, x0, seed)
  with images.whole(args.output) as path:
    path.write_bytes(sent.data)
  print(table(sent, x0))
  logs.say(f'{len(sent.data)} bytes: {args.output}')


def describe(shape: Sequence[int]) -> str:
  return f'of {shape[0]} x {shape[1]} x {shape[2]}'


def read(path: pathlib.Path, config: ConfigDict) -> np.ndarray:
  """The images of a file, a folder or an array, as the model takes them.

  Raises:
    UserError: if there are none, or one cannot be read.
  """
  if not recipe.image_size(config):
    raise errors.UserError('the codec is of images, and this run is of points')
  H, W, C = recipe.shape(config)
  shape = H, W, C
  options: dict[str, Any] = {'image_size': (H, W), 'channels': C}
  if path.suffix.lower() in ('.npz', '.npy'):
    source = sources.arrays(path=str(path), **options)
    every, _ = arrayfile.load(str(path))
    h, w = every.shape[1:3]
    say_sizes(path, [(w, h)] * len(every), shape)
  elif path.is_dir():
    options |= {'max_unreadable': 0, 'max_value': config.data.max_value}
    source = sources.folder(path=str(path), **options)
    names = listing.find(str(path))
    say_sizes(path, [size_of(path / name) for name in names], shape)
  else:
    image = edit.opened('images', path)
    fitted = edit.fitted(path, image, shape, config.data.max_value)
    return np.asarray(fitted)[None]
  return source.gather(np.arange(len(source)))['image']


def size_of(path: pathlib.Path) -> tuple[int, int]:
  """(width, height) of an upright image file, which is not decoded."""
  height, width, _ = decode.shape_of(str(path))
  return width, height


def say_sizes(
  path: pathlib.Path, sizes: list[tuple[int, int]], shape: decode.Shape
) -> None:
  """Says how many images of what sizes are resized, if any are."""
  height, width, _ = shape
  others = collections.Counter(x for x in sizes if x != (width, height))
  shown = others.most_common(3 if len(others) > 4 else 4)
  told = [f'{n} of {w}x{h}' for (w, h), n in shown]
  if len(others) > len(shown):
    more = others.total() - sum(n for _, n in shown)
    told.append(f'{more} of {len(others) - len(shown)} other sizes')
  if told:
    edit.say_resized(f'of the images of {path}, {", ".join(told)}', shape)


def model_digest(config: ConfigDict, params: Any) -> int:
  """Of all that decides what the network computes."""
  names = ('model', 'schedule')
  about = {name: recipe.to_json(config[name]) for name in names}
  # It came after the first files were written.
  if about['schedule'].get('s') == recipe.defaults().get('schedule.s'):
    about['schedule'].pop('s', None)
  return fingerprint.crc32({**about, 'arrays': fingerprint.describe(params)})


def software() -> dict[str, str]:
  """What the last bits of the network's numbers depend on."""
  versions = {
    name: importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'flax')
  }
  return {**versions, 'device': jax.devices()[0].device_kind}


class Codec(NamedTuple):
  """The two parts of the codec, as functions of the weights `params`."""

  errors: Callable[..., Any]  # (params, batch) -> (S, B); see `codec.errors`
  run: Callable[..., codec.Passed]  # see `codec.run`
  schedule: schedules.Schedule  # of the jumps


def codec_of(config: ConfigDict, seed: int) -> Codec:
  """The codec of a recipe, for batches with `image` and `index`."""
  c, module, full = config.codec, build.network(config), build.schedule(config)
  rules = codec.Rules(c.log2_candidates, c.group_bits)

  def jumps(network: Any) -> denoisers.Denoiser:
    return build.call(
      codec.jumps, c, build.denoiser(config, full, network), of='codec'
    )

  def of_weights(params: Any) -> denoisers.Denoiser:
    return jumps(build.applied(module, params))

  def errors_of(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    keys, _ = sampling.noise(config, seed, batch['index'])
    x0 = pixels.to_float(batch['image'])
    return codec.errors(of_weights(params), keys, x0)

  def run(
    params: Any,
    batch: dict[str, jax.Array],
    squares: jax.Array,
    code: codec.Code,
    sending: jax.Array,
  ) -> codec.Passed:
    _, x_T = sampling.noise(config, seed, batch['index'])
    return codec.run(
      *(of_weights(params), build.key(seed, 'codec'), x_T),
      rules=rules,
      squares=squares,
      code=code,
      x0=pixels.to_float(batch['image']),
      sending=sending,
    )

  return Codec(errors_of, run, jumps(lambda x_t, t: x_t).schedule)


class Lockstep(NamedTuple):
  """The one program of both sides, compiled for batches of `size`."""

  run: Any
  size: int
  dims: int
  steps: int


def compiled(config: ConfigDict, params: Any, size: int, seed: int) -> Lockstep:
  S, shape = config.codec.steps, recipe.shape(config)
  D = math.prod(shape)
  batch = {
    'image': jax.ShapeDtypeStruct((size, *shape), np.uint8),
    'index': jax.ShapeDtypeStruct((size,), np.int32),
  }
  told = codec.Code(
    jax.ShapeDtypeStruct((S, size), np.int32),
    jax.ShapeDtypeStruct((S, size, D), np.int32),
  )
  squares = jax.ShapeDtypeStruct((S,), np.float32)
  sending = jax.ShapeDtypeStruct((), np.bool_)
  run = jax.jit(codec_of(config, seed).run)
  lower = logs.compiling('the codec', lambda *x: run.lower(*x).compile())
  return Lockstep(lower(params, batch, squares, told, sending), size, D, S)


def batches(
  x0: np.ndarray, size: int
) -> Iterator[tuple[dict[str, np.ndarray], int, int]]:
  """Batches of one size, where each begins, and how many of it are real.

  The last is filled up with black, as the receiver has no images.
  """
  for start in range(0, len(x0), size):
    real = x0[start : start + size]
    image = np.zeros((size, *x0.shape[1:]), np.uint8)
    image[: len(real)] = real
    index = np.arange(start, start + size, dtype=np.int32)
    yield {'image': image, 'index': index}, start, len(real)


def send(config: ConfigDict, params: Any, x0: np.ndarray, seed: int) -> Sent:
  """The file of uint8 images (N, H, W, C), with a progress bar."""
  size = min(len(x0), config.codec.batch_size)
  parts = codec_of(config, seed)
  program = compiled(config, params, size, seed)
  squares_of = logs.compiling("the network's errors", jax.jit(parts.errors))
  begun = time.perf_counter()
  every = []
  with logs.Progress('measuring', len(x0)) as bar:
    for batch, _, real in batches(x0, size):
      every.append(np.asarray(squares_of(params, batch))[:, :real])
      bar.update(real)
  # In float32 both sides read the same of what the header says.
  mean = np.concatenate(every, axis=1).mean(1)
  squares = [float(f'{x:.3g}') for x in mean]
  nothing = codec.Code(
    np.zeros((program.steps, size), np.int32),
    np.zeros((program.steps, size, program.dims), np.int32),
  )
  passed = run_batches(config, program, params, x0, squares, nothing, True)
  c = config.codec
  header = {
    'model': model_digest(config, params),
    'images': len(x0),
    'shape': list(x0.shape[1:]),
    'codec': {
      'steps': c.steps,
      'log2_candidates': c.log2_candidates,
      'group_bits': c.group_bits,
      'batch_size': size,
    },
    'seed': seed,
    'squares': squares,
    'software': software(),
  }
  data, bits, around = bitstream.write(
    header,
    rules(config, squares),
    passed.code.size,
    passed.code.chosen,
    check_of(passed.check)[1:],
  )
  seconds = time.perf_counter() - begun
  steps = np.asarray(parts.schedule.time)[:0:-1]
  return Sent(data, around, bits, passed.nats, passed.shown, steps, seconds)


def run_batches(
  config: ConfigDict,
  program: Lockstep,
  params: Any,
  x0: np.ndarray,
  squares: list[float],
  told: codec.Code,
  sending: bool,
) -> Any:
  """One side for all images: a `codec.Passed` of NumPy arrays.

  `told` is of all N images; for the sender, nothing of one batch serves all.
  """
  passed: list[Any] = []
  begun = time.perf_counter()
  name = 'compressing' if sending else 'decompressing'
  with logs.Progress(name, len(x0)) as bar:
    for batch, start, real in batches(x0, program.size):
      of_batch = jax.tree.map(
        lambda x, at=start: filled(x[:, at : at + program.size], program.size),
        told,
      )
      # The sender is told nothing, and what is filled up takes no room.
      part = program.run(
        *(params, batch, np.array(squares, np.float32)),
        *(of_batch, np.array(sending)),
      )
      passed.append(jax.tree.map(lambda x, n=real: np.asarray(x)[:, :n], part))
      bar.update(real)
      left = math.ceil(len(x0) / program.size) - len(passed)
      if len(passed) == 1 and left:
        seconds = time.perf_counter() - begun
        logs.say(
          f'the first of {left + 1} batches took {seconds:.1f} s: about '
          f'{seconds * left:.0f} s to go'
        )
  return jax.tree.map(lambda *x: np.concatenate(x, axis=1), *passed)


def filled(x: np.ndarray, size: int) -> np.ndarray:
  """(S, n, ...) with zeros to (S, size, ...)."""
  more = size - x.shape[1]
  return np.pad(x, [(0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)])


def rules(config: ConfigDict, squares: list[float]) -> bitstream.Rules:
  """What the bits of a file follow from, beside the code itself."""
  short = codec_of(config, 0).schedule
  expected = codec.expected(short, np.array(squares))
  dims = math.prod(recipe.shape(config))
  return bitstream.Rules(codec.sizes(dims), expected.tolist())


def check_of(check: np.ndarray) -> np.ndarray:
  """16 bits of the checksums (S+1, N) of all images after each step."""
  total = check.sum(1, dtype=np.uint32)
  return (total ^ total >> 16) & 0xFFFF


class Spent(NamedTuple):
  """By steps received, 0 to S: bits/dim, and RMSE of 0..255."""

  kl: np.ndarray
  code: np.ndarray
  rmse: np.ndarray


def spent(sent: Sent, x0: np.ndarray) -> Spent:
  """Sums over the steps so far, means over the images."""
  bits = sent.nats.sum(1) * likelihood.BITS
  gap = sent.shown.astype(np.float32) - x0
  return Spent(
    np.cumsum([0, *bits]) / x0.size,
    np.cumsum([0, *sent.bits]) / x0.size,
    np.sqrt(np.square(gap).mean((1, 2, 3, 4))),
  )


def table(sent: Sent, x0: np.ndarray) -> str:
  """For a person."""
  s = spent(sent, x0)
  S = len(s.kl) - 1
  lines = [
    'steps      t   ΣKL (bits/dim)   code (bits/dim)   more   RMSE (0..255)'
  ]
  for k in sorted({round(S * i / 10) for i in range(11)}):
    more = f'{100 * (s.code[k] / s.kl[k] - 1):4.0f}%' if s.kl[k] else '     '
    lines += [
      f'{k:5} {sent.time[k]:6}   {s.kl[k]:14.4f}   {s.code[k]:15.4f}  '
      f'{more}   {s.rmse[k]:13.3f}'
    ]
  n = len(x0)
  return '\n'.join(
    [
      *lines,
      f'{len(sent.data)} bytes, {len(sent.data) / n:.1f} an image; '
      f'{sent.around} of them header, lengths and checks',
      f'{sent.seconds / n:.3f} seconds an image',
    ]
  )
