"""The codec's file format: a header and chunks; it can be truncated anywhere.

  b'\\x89DDPMC' version  (2 bytes) length  zlib of JSON  (4 bytes) CRC-32
  then, for each chunk, which holds one or more steps of all images:
  steps  length  range-coded bits  (2 bytes) check  (4 bytes) CRC-32

`steps` and `length` are LEB128. `check` is a checksum of the sender's state
after the chunk. Each CRC continues that of the chunk before, so that a missing
chunk is detected.
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np

from ddpm_jax import errors
from ddpm_jax import jsonfile
from ddpm_jax import ranges
from ddpm_jax.compression import range_coder

MAGIC = b'\x89DDPMC'
VERSION = 1
CHUNK = 128  # minimum bytes of a chunk, of which framing takes about 9
LONGEST = 2**20  # bytes of a header's JSON: some 100 000 steps
# A header with more images for each byte of the (truncated) file is damaged. An
# image may take less than a bit, but a header takes hundreds of bytes.
IMAGES_A_BYTE = 1000


class Rules(NamedTuple):
  """What both sides know in advance and the range coder depends on."""

  sizes: Sequence[int]  # allowed group sizes
  expected: Sequence[float]  # bits per dimension of each step


FIELDS = {
  'model': ranges.WHOLE,
  'images': ranges.POSITIVE,
  'shape': ranges.SIZE._replace(lengths=(3,), like='[32, 32, 3]'),
  'codec': ranges.Range(dict),
  'seed': ranges.SEED,
  # Squared differences of numbers in [-1, 1].
  'squares': ranges.Range(
    float, 0, 4, open_low=True, lengths=range(10**6), like='[0.1, 0.2]'
  ),
  'software': ranges.Range(dict),
  'bytes': ranges.NATURAL,
}
CODEC_FIELDS = {
  key.removeprefix('codec.'): allowed
  for key, allowed in ranges.KEYS.items()
  if key.startswith('codec.')
}


class Read(NamedTuple):
  """The contents of a file, as far as its s complete steps."""

  header: dict[str, Any]
  size: np.ndarray  # (s, N), see `codec.Code`
  chosen: np.ndarray  # (s, N, D), see `codec.Code`
  checks: dict[int, int]  # steps at the end of a chunk -> checksum
  ends: dict[int, int]  # steps at the end of a chunk -> bytes up to there


def write(
  header: dict[str, Any],
  rules: Rules,
  size: np.ndarray,
  chosen: np.ndarray,
  check: np.ndarray,
) -> tuple[bytes, np.ndarray, int]:
  """Returns the bytes of a file.

  Args:
    header: A JSON object.
    rules: What both sides know in advance.
    size: (S, N), group sizes, as indices into `rules.sizes`.
    chosen: (S, N, D), chosen candidates, equal within a group.
    check: (S,), checksum of the state after each step, in 0..65535.

  Returns:
    The bytes; the number of bits of each step's code, (S,); and the number of
    bytes that are not code.
  """
  odds, steps, chunks, bits = range_coder.Odds(), 0, [], []
  coder, inner = range_coder.Encoder(odds), 0
  before = np.full(size.shape[1], len(rules.sizes) - 1)
  for step in range(len(size)):
    start = coder.length()
    _code_step(coder, rules, step, before, size[step], chosen[step])
    bits.append(coder.length() - start)
    before, steps = size[step], steps + 1
    if coder.length() < 8 * CHUNK and step < len(size) - 1:
      continue
    coded = coder.finish()
    inner += len(coded)
    front = _leb128(steps) + _leb128(len(coded))
    chunks.append(front + coded + struct.pack('>H', check[step]))
    coder, steps = range_coder.Encoder(odds), 0
  total = sum(len(chunk) + 4 for chunk in chunks)
  text = zlib.compress(json.dumps({**header, 'bytes': total}).encode(), 9)
  parts, crc = [MAGIC + struct.pack('>BH', VERSION, len(text)) + text], 0
  for chunk in [*chunks, b'']:
    crc = zlib.crc32(parts[-1], crc)
    parts += [struct.pack('>I', crc), chunk]
  data = b''.join(parts)
  return data, np.array(bits), len(data) - inner


def read_header(data: bytes) -> tuple[dict[str, Any], int]:
  """Returns the header and its length in bytes.

  Raises:
    UserError: If this is not a file of this format, or its header is damaged or
      truncated.
  """
  if data[: len(MAGIC)] != MAGIC:
    raise errors.UserError('this file was not written by --mode=compress')
  at = len(MAGIC) + 3
  version, length = struct.unpack('>BH', data[at - 3 : at].ljust(3, b'\0'))
  if len(data) < at or len(data) < at + length + 4:
    raise errors.UserError('the header is truncated: more bytes are needed')
  if version != VERSION:
    raise errors.UserError(
      f'this file has version {version} of the format, and this program reads '
      f'version {VERSION}: use the program that wrote it'
    )
  text, crc = data[: at + length], data[at + length : at + length + 4]
  if struct.pack('>I', zlib.crc32(text)) != crc:
    raise errors.UserError('the header is damaged')
  unpack = zlib.decompressobj()
  try:
    header = jsonfile.parse(unpack.decompress(text[at:], LONGEST))
  except (zlib.error, ValueError):
    raise errors.UserError('the header is damaged') from None
  if unpack.unconsumed_tail or not isinstance(header, dict):
    raise errors.UserError('the header is damaged')
  check_header(header, len(data))
  return header, at + length + 4


def check_header(header: dict[str, Any], length: int) -> None:
  """Rejects a header that is not that of a file of `length` bytes.

  Raises:
    UserError: If a field is wrong; the message names the first.
  """
  ranges.check_fields(header, FIELDS)
  settings = header['codec']
  ranges.check_fields(settings, CODEC_FIELDS)
  software = header['software']
  ranges.check_fields(software, dict.fromkeys(software, ranges.TEXT))
  N, S, D = header['images'], settings['steps'], math.prod(header['shape'])
  numbers = N * D * S
  for field, wrong in {
    f'images={N}': IMAGES_A_BYTE * length < N,
    f'squares of {len(header["squares"])} steps': len(header['squares']) != S,
    f'batch_size={settings["batch_size"]}': settings['batch_size'] > N,
    f'{N} images of {D} numbers in {S} steps, more than memory holds,': (
      16 * numbers > _memory()  # int32, up to four copies at once
    ),
  }.items():
    if wrong:
      raise errors.UserError(
        f'the header claims {field} in {length} bytes: the file is damaged'
      )


def _memory() -> int:
  """Physical memory of this machine, in bytes."""
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def read(data: bytes, rules: Rules) -> tuple[Read, bool]:
  """Returns the contents of a file, and whether it is complete.

  Args:
    data: The file, or its first bytes.
    rules: What both sides know in advance.

  Raises:
    UserError: If this is not a file of this format, or it is damaged.
  """
  header, at = read_header(data)
  S, N = header['codec']['steps'], header['images']
  D = math.prod(header['shape'])
  size: list[np.ndarray] = []
  chosen: list[np.ndarray] = []
  checks: dict[int, int] = {}
  ends: dict[int, int] = {0: at}
  odds, before = range_coder.Odds(), np.full(N, len(rules.sizes) - 1)
  for steps, coded, check, end in chunks(data, at, header['bytes']):
    if len(size) + steps > S:
      raise errors.UserError(damaged(ends))
    coder = range_coder.Decoder(odds, coded)
    for _ in range(steps):
      choices = np.zeros((N, D), np.int32)
      try:
        before = _code_step(coder, rules, len(size), before, None, choices)
      except (ValueError, IndexError, OverflowError):
        raise errors.UserError(damaged(ends)) from None
      size.append(before)
      chosen.append(choices)
    checks[len(size)], ends[len(size)] = check, end
  if len(size) == S and ends[S] != len(data):
    raise errors.UserError('bytes follow the last chunk: the file is damaged')
  sizes = np.array(size, np.int32).reshape(-1, N)
  indices = np.array(chosen, np.int32).reshape(-1, N, D)
  return Read(header, sizes, indices, checks, ends), len(size) == S


def chunks(
  data: bytes, at: int, total: int
) -> Iterator[tuple[int, bytes, int, int]]:
  """Yields (steps, code, check, end) for each complete chunk from `at` on.

  Raises:
    UserError: If a chunk is damaged, or ends after `total` bytes of chunks.
  """
  crc = int.from_bytes(data[at - 4 : at], 'big')
  ends, last = {0: at}, at + total
  while at < len(data):
    steps, after = _from_leb128(data, at)
    length, after = _from_leb128(data, after)
    end = after + length + 6
    if end > last:
      raise errors.UserError(damaged(ends))
    if end > len(data):
      return
    crc = zlib.crc32(data[at : end - 4], crc)
    if struct.pack('>I', crc) != data[end - 4 : end]:
      raise errors.UserError(damaged(ends))
    (check,) = struct.unpack('>H', data[end - 6 : end - 4])
    yield steps, data[after : after + length], check, end
    at = end
    ends[at] = at


def damaged(ends: dict[int, int]) -> str:
  """The error message for a file that is intact up to the last of `ends`."""
  good = list(ends.values())[-1]
  rest = f'; --bytes={good} uses the intact part' if len(ends) > 1 else ''
  return f'the file is damaged after byte {good}{rest}'


def _code_step(
  coder: range_coder.Encoder | range_coder.Decoder,
  rules: Rules,
  step: int,
  before: np.ndarray,
  size: np.ndarray | None,
  chosen: np.ndarray,
) -> np.ndarray:
  """Encodes or decodes one step of all images; returns the group sizes.

  Sizes are coded as differences from `before`, those of the previous step. A
  decoder takes `size=None`, and fills `chosen`.
  """
  sending, sizes = size is not None, np.zeros(len(chosen), int)
  for n, row in enumerate(chosen):
    less = None if size is None else int(before[n] - size[n])
    zigzag = None if less is None else abs(2 * less) - (less > 0)
    zigzag = range_coder.unary(coder, ('size',), zigzag)
    sizes[n] = before[n] - (zigzag // 2 + 1 if zigzag % 2 else -zigzag // 2)
    if not 0 <= sizes[n] < len(rules.sizes):
      raise ValueError(f'there is no group size number {sizes[n]}')
    m = rules.sizes[sizes[n]]
    level = max(-4, round(2 * math.log2(m * rules.expected[step])))
    for d in range(0, len(row), m):
      i = int(row[d]) if sending else None
      i = range_coder.whole(coder, ('index', level), i)
      if not sending:
        row[d : d + m] = i
  return sizes


def _leb128(n: int) -> bytes:
  low, rest = n & 127, n >> 7
  return bytes([low | 128]) + _leb128(rest) if rest else bytes([low])


def _from_leb128(data: bytes, at: int) -> tuple[int, int]:
  """The number at `at`, and where it ends; (0, len(data)) if truncated."""
  n = 0
  for i, byte in enumerate(data[at : at + 5]):
    n |= (byte & 127) << 7 * i
    if byte < 128:
      return n, at + i + 1
  return 0, len(data)
