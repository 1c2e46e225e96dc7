"""Compresses many images into a file, and decompresses it."""

import importlib.metadata
import math
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
from ddpm_jax import recipe
from ddpm_jax import sampling
from ddpm_jax.compression import codec
from ddpm_jax.compression import file_format
from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import pixels
from ddpm_jax.diffusion import schedules
from ddpm_jax.storage import fingerprint
from ddpm_jax.storage import logs


class Sent(NamedTuple):
  """The result of `send` for N images in S steps."""

  data: bytes
  around: int  # bytes of `data` that are header, lengths and checksums
  bits: np.ndarray  # (S,), code of each step for all images
  nats: np.ndarray  # (S, N), KL(q ‖ p)
  shown: np.ndarray  # (S+1, N, H, W, C) uint8, x̂_0 after 0, ..., S steps
  time: np.ndarray  # (S+1,), t after 0, ..., S steps
  seconds: float  # without compilation


def describe(shape: Sequence[int]) -> str:
  """The size of images as text, to follow the word `images`."""
  return f'of {shape[0]} x {shape[1]} x {shape[2]}'


def model_digest(config: ConfigDict, params: Any) -> int:
  """Digest of everything that determines what the network computes."""
  names = ('model', 'schedule')
  about = {name: recipe.to_json(config[name]) for name in names}
  # Keeps files valid that were written before this key existed.
  if about['schedule'].get('s') == recipe.defaults().get('schedule.s'):
    about['schedule'].pop('s', None)
  return fingerprint.crc32({**about, 'arrays': fingerprint.describe(params)})


def software() -> dict[str, str]:
  """Software and device on which the network's output bits depend."""
  versions = {
    name: importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'flax')
  }
  return {**versions, 'device': jax.devices()[0].device_kind}


class Codec(NamedTuple):
  """The codec's functions, of the weights and a batch (`image`, `index`)."""

  errors: Callable[..., Any]  # (params, batch) -> (S, B); see `codec.errors`
  run: Callable[..., codec.Passed]  # see `codec.run`
  schedule: schedules.Schedule  # see `codec.jumps`


def make_codec(config: ConfigDict, seed: int) -> Codec:
  """Returns the codec of a recipe."""
  c, module, full = config.codec, build.network(config), build.schedule(config)
  rules = codec.Rules(c.log2_candidates, c.group_bits)

  def jumps(network: Any) -> denoisers.Denoiser:
    return build.call(
      codec.jumps, c, build.denoiser(config, full, network), of='codec'
    )

  def denoiser(params: Any) -> denoisers.Denoiser:
    return jumps(build.applied(module, params))

  def mean_squares(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    keys, _ = sampling.noise(config, seed, batch['index'])
    x0 = pixels.to_float(batch['image'])
    return codec.errors(denoiser(params), keys, x0)

  def run(
    params: Any,
    batch: dict[str, jax.Array],
    squares: jax.Array,
    code: codec.Code,
    sending: jax.Array,
  ) -> codec.Passed:
    _, x_T = sampling.noise(config, seed, batch['index'])
    return codec.run(
      *(denoiser(params), build.key(seed, 'codec'), x_T),
      rules=rules,
      squares=squares,
      code=code,
      x0=pixels.to_float(batch['image']),
      sending=sending,
    )

  return Codec(mean_squares, run, jumps(lambda x_t, t: x_t).schedule)


class Program(NamedTuple):
  """`codec.run`, compiled once for both sides, for batches of `size` images."""

  run: Any
  size: int
  dims: int
  steps: int


def compiled(config: ConfigDict, params: Any, size: int, seed: int) -> Program:
  S, shape = config.codec.steps, recipe.shape(config)
  D = math.prod(shape)
  batch = {
    'image': jax.ShapeDtypeStruct((size, *shape), np.uint8),
    'index': jax.ShapeDtypeStruct((size,), np.int32),
  }
  code = codec.Code(
    jax.ShapeDtypeStruct((S, size), np.int32),
    jax.ShapeDtypeStruct((S, size, D), np.int32),
  )
  squares = jax.ShapeDtypeStruct((S,), np.float32)
  sending = jax.ShapeDtypeStruct((), np.bool_)
  run = jax.jit(make_codec(config, seed).run)
  lower = logs.compiling('the codec', lambda *x: run.lower(*x).compile())
  return Program(lower(params, batch, squares, code, sending), size, D, S)


def batches(
  x0: np.ndarray, size: int
) -> Iterator[tuple[dict[str, np.ndarray], int, int]]:
  """Yields batches of `size`, their first index, and their number of images.

  The last batch is padded with zeros.
  """
  for start in range(0, len(x0), size):
    real = x0[start : start + size]
    image = np.zeros((size, *x0.shape[1:]), np.uint8)
    image[: len(real)] = real
    index = np.arange(start, start + size, dtype=np.int32)
    yield {'image': image, 'index': index}, start, len(real)


def send(config: ConfigDict, params: Any, x0: np.ndarray, seed: int) -> Sent:
  """Compresses uint8 images (N, H, W, C), with a progress bar."""
  size = min(len(x0), config.codec.batch_size)
  parts = make_codec(config, seed)
  program = compiled(config, params, size, seed)
  squares_of = logs.compiling("the network's errors", jax.jit(parts.errors))
  begun = time.perf_counter()
  every = []
  with logs.Progress('measuring', len(x0)) as bar:
    for batch, _, real in batches(x0, size):
      every.append(np.asarray(squares_of(params, batch))[:, :real])
      bar.update(real)
  # Rounded as in the header, so that both sides use the same float32.
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
  data, bits, around = file_format.write(
    header,
    rules(config, squares),
    passed.code.size,
    passed.code.chosen,
    fold_checks(passed.check)[1:],
  )
  seconds = time.perf_counter() - begun
  steps = np.asarray(parts.schedule.time)[:0:-1]
  return Sent(data, around, bits, passed.nats, passed.shown, steps, seconds)


def run_batches(
  config: ConfigDict,
  program: Program,
  params: Any,
  x0: np.ndarray,
  squares: list[float],
  code: codec.Code,
  sending: bool,
) -> Any:
  """Runs one side for all N images; returns a `codec.Passed` of NumPy arrays.

  The receiver's `code` covers all N images. The sender's is ignored, and may
  cover any number of them.
  """
  passed: list[Any] = []
  begun = time.perf_counter()
  name = 'compressing' if sending else 'decompressing'
  with logs.Progress(name, len(x0)) as bar:
    for batch, start, real in batches(x0, program.size):
      batch_code = jax.tree.map(
        lambda x, at=start: padded(x[:, at : at + program.size], program.size),
        code,
      )
      part = program.run(
        *(params, batch, np.array(squares, np.float32)),
        *(batch_code, np.array(sending)),
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


def padded(x: np.ndarray, size: int) -> np.ndarray:
  """Pads (S, n, ...) with zeros to (S, size, ...)."""
  more = size - x.shape[1]
  return np.pad(x, [(0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)])


def rules(config: ConfigDict, squares: list[float]) -> file_format.Rules:
  """The rules of the file format for a recipe and the `codec.errors`."""
  schedule = make_codec(config, 0).schedule
  expected = codec.expected(schedule, np.array(squares))
  dims = math.prod(recipe.shape(config))
  return file_format.Rules(codec.sizes(dims), expected.tolist())


def fold_checks(check: np.ndarray) -> np.ndarray:
  """Folds checksums (S+1, N) of all images into 16 bits for each step."""
  total = check.sum(1, dtype=np.uint32)
  return (total ^ total >> 16) & 0xFFFF


class Spent(NamedTuple):
  """Rate and distortion after 0, ..., S steps."""

  kl: np.ndarray  # bits/dim
  code: np.ndarray  # bits/dim
  rmse: np.ndarray  # of values in 0..255


def spent(sent: Sent, x0: np.ndarray) -> Spent:
  """Computes rates, summed over the steps so far, and distortions."""
  bits = sent.nats.sum(1) * likelihood.BITS
  gap = sent.shown.astype(np.float32) - x0
  return Spent(
    np.cumsum([0, *bits]) / x0.size,
    np.cumsum([0, *sent.bits]) / x0.size,
    np.sqrt(np.square(gap).mean((1, 2, 3, 4))),
  )


def table(sent: Sent, x0: np.ndarray) -> str:
  """Rates and distortions in at most eleven lines, and totals, as text."""
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
      f'{len(sent.data)} bytes, {len(sent.data) / n:.1f} per image; '
      f'{sent.around} of them are header, lengths and checksums',
      f'{sent.seconds / n:.3f} seconds per image',
    ]
  )


def images_of(
  config: ConfigDict, params: Any, data: bytes
) -> tuple[int, np.ndarray, float]:
  """Like `receive`, for a file written by this model and this process."""
  header, _ = file_format.read_header(data)
  read, _ = file_format.read(data, rules(config, header['squares']))
  config = config.copy_and_resolve_references()
  config.codec.update(header['codec'])
  return receive(config, params, read)


def receive(
  config: ConfigDict, params: Any, read: file_format.Read
) -> tuple[int, np.ndarray, float]:
  """Decompresses the contents of a file.

  Returns:
    The number of usable steps, the uint8 images after them, and the seconds.

  Raises:
    UserError: If the network's output differs from the sender's at once.
  """
  header = read.header
  N, size, S = header['images'], config.codec.batch_size, config.codec.steps
  program = compiled(config, params, size, header['seed'])
  begun = time.perf_counter()
  code = codec.Code(
    *(
      np.pad(x, [(0, S - len(x)), *[(0, 0)] * (x.ndim - 1)])
      for x in (read.size, read.chosen)
    )
  )
  black = np.zeros((N, *header['shape']), np.uint8)
  passed = run_batches(
    config, program, params, black, header['squares'], code, False
  )
  seconds = time.perf_counter() - begun
  check, done = fold_checks(passed.check), 0
  for steps, theirs in read.checks.items():
    if check[steps] != theirs:
      logs.say(
        f'from step {done + 1} on the network computes other numbers than when '
        'this was compressed; the images use only the steps before'
      )
      break
    done = steps
  if not done and read.checks:
    raise errors.UserError(
      'the network computes other numbers than when this was compressed: '
      'use the same kind of machine and the same software, '
      + ', '.join(
        f'{errors.short(k)} {errors.short(v)}'
        for k, v in list(header['software'].items())[:4]
      )
    )
  return done, passed.shown[done], seconds
