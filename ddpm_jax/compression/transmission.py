"""Both sides of the codec for many images: sending and receiving a file."""

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
  """What `send` has done with N images of D dimensions in S steps."""

  data: bytes
  around: int  # bytes of `data` that are header, lengths and checks
  bits: np.ndarray  # (S,), of the code of each step of all images
  nats: np.ndarray  # (S, N), KL(q ‖ p)
  shown: np.ndarray  # (S+1, N, H, W, C) uint8, x̂_0 after so many steps
  time: np.ndarray  # (S+1,), t after so many steps
  seconds: float  # without compiling


def describe(shape: Sequence[int]) -> str:
  return f'of {shape[0]} x {shape[1]} x {shape[2]}'


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
  data, bits, around = file_format.write(
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


def rules(config: ConfigDict, squares: list[float]) -> file_format.Rules:
  """What the bits of a file follow from, beside the code itself."""
  short = codec_of(config, 0).schedule
  expected = codec.expected(short, np.array(squares))
  dims = math.prod(recipe.shape(config))
  return file_format.Rules(codec.sizes(dims), expected.tolist())


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


def images_of(
  config: ConfigDict, params: Any, data: bytes
) -> tuple[int, np.ndarray, float]:
  """As `receive`, of bytes that this very model and program have written."""
  header, _ = file_format.read_header(data)
  read, _ = file_format.read(data, rules(config, header['squares']))
  config = config.copy_and_resolve_references()
  config.codec.update(header['codec'])
  return receive(config, params, read)


def receive(
  config: ConfigDict, params: Any, read: file_format.Read
) -> tuple[int, np.ndarray, float]:
  """How many steps there are, the uint8 images after them, and the seconds.

  Raises:
    UserError: if what is computed here is not what the sender had.
  """
  header = read.header
  N, size, S = header['images'], config.codec.batch_size, config.codec.steps
  program = compiled(config, params, size, header['seed'])
  begun = time.perf_counter()
  told = codec.Code(
    *(
      np.pad(x, [(0, S - len(x)), *[(0, 0)] * (x.ndim - 1)])
      for x in (read.size, read.chosen)
    )
  )
  black = np.zeros((N, *header['shape']), np.uint8)
  passed = run_batches(
    config, program, params, black, header['squares'], told, False
  )
  seconds = time.perf_counter() - begun
  check, done = check_of(passed.check), 0
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
