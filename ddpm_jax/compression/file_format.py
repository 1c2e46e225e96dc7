"""The file of the codec: a header, then chunks that can be cut off anywhere.

  b'\\x89DDPMC' version  (2 bytes) length  zlib of JSON  (4 bytes) CRC-32
  then, for each chunk, a step or more of all images:
  steps  length  range-coded bits  (2 bytes) check  (4 bytes) CRC-32

`steps` and `length` are LEB128; the check is of what the sender held after the
chunk; a CRC goes on from that of the chunk before, so that none can be missing.
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
CHUNK = 128  # bytes that a chunk has at least: framing takes about 9
LONGEST = 2**20  # bytes of a header's JSON: some 100 000 steps
# Of a file or the first part of one. Less than a bit tells an image at best,
# but a header is of hundreds of bytes.
IMAGES_A_BYTE = 1000


class Rules(NamedTuple):
  """What both sides know beforehand, and the bits follow from."""

  sizes: Sequence[int]  # that groups may be of
  expected: Sequence[float]  # bits of a dimension, by step


FIELDS = {
  'model': ranges.WHOLE,
  'images': ranges.POSITIVE,
  'shape': ranges.SIZE._replace(lengths=(3,), like='[32, 32, 3]'),
  'codec': ranges.Range(dict),
  'seed': ranges.SEED,
  # Of numbers in [-1, 1].
  'squares': ranges.Range(
    float, 0, 4, open_low=True, lengths=range(10**6), like='[0.1, 0.2]'
  ),
  'software': ranges.Range(dict),
  'bytes': ranges.NATURAL,
}
OF_CODEC = {
  key.removeprefix('codec.'): allowed
  for key, allowed in ranges.KEYS.items()
  if key.startswith('codec.')
}


class Read(NamedTuple):
  """What is in a file, or in what there is of it."""

  header: dict[str, Any]
  size: np.ndarray  # (s, N), of the whole steps; see `compression/codec.py`
  chosen: np.ndarray  # (s, N, D)
  checks: dict[int, int]  # of the state after so many steps, at a chunk's end
  ends: dict[int, int]  # the bytes up to there


def write(
  header: dict[str, Any],
  rules: Rules,
  size: np.ndarray,
  chosen: np.ndarray,
  check: np.ndarray,
) -> tuple[bytes, np.ndarray, int]:
  """The bytes of a file.

  Args:
    header: JSON.
    rules: what both sides know beforehand.
    size: (S, N), which of them each image has.
    chosen: (S, N, D), one and the same within a group.
    check: (S,), of the state after each step, in 0..65535.

  Returns:
    The bytes; how many bits the codes of each step take, (S,); and how many of
    the bytes are not of these.
  """
  odds, steps, chunks, bits = range_coder.Odds(), 0, [], []
  coder, inner = range_coder.Encoder(odds), 0
  before = np.full(size.shape[1], len(rules.sizes) - 1)
  for step in range(len(size)):
    start = coder.length()
    _one(coder, rules, step, before, size[step], chosen[step])
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
  """The header, and how many bytes it takes.

  Raises:
    UserError: if it is not that of such a file, or damaged, or cut off.
  """
  if data[: len(MAGIC)] != MAGIC:
    raise errors.UserError('it is not a file of --mode=compress')
  at = len(MAGIC) + 3
  version, length = struct.unpack('>BH', data[at - 3 : at].ljust(3, b'\0'))
  if len(data) < at or len(data) < at + length + 4:
    raise errors.UserError('it ends before its header does: more is needed')
  if version != VERSION:
    raise errors.UserError(
      f'it is of version {version} of the format, and this program reads '
      f'version {VERSION}: use the program that wrote it'
    )
  text, crc = data[: at + length], data[at + length : at + length + 4]
  if struct.pack('>I', zlib.crc32(text)) != crc:
    raise errors.UserError('its header is damaged')
  unpack = zlib.decompressobj()
  try:
    header = jsonfile.parse(unpack.decompress(text[at:], LONGEST))
  except (zlib.error, ValueError):
    raise errors.UserError('its header is damaged') from None
  if unpack.unconsumed_tail or not isinstance(header, dict):
    raise errors.UserError('its header is damaged')
  check_header(header, len(data))
  return header, at + length + 4


def check_header(header: dict[str, Any], length: int) -> None:
  """Refuses a header that `write` is not given; `length` is of its file.

  Raises:
    UserError: naming the first field that is wrong.
  """
  ranges.check_fields(header, FIELDS)
  of_codec = header['codec']
  ranges.check_fields(of_codec, OF_CODEC)
  software = header['software']
  ranges.check_fields(software, dict.fromkeys(software, ranges.TEXT))
  N, S, D = header['images'], of_codec['steps'], _count(header['shape'])
  numbers = N * D * S
  for field, wrong in {
    f'images={N}': IMAGES_A_BYTE * length < N,
    f'squares of {len(header["squares"])} steps': len(header['squares']) != S,
    f'batch_size={of_codec["batch_size"]}': of_codec['batch_size'] > N,
    f'{N} images of {D} numbers in {S} steps, more than memory holds,': (
      16 * numbers > _memory()  # int32, four times over on the way
    ),
  }.items():
    if wrong:
      raise errors.UserError(
        f'its header tells of {field} in {length} bytes: it is damaged'
      )


def _memory() -> int:
  """Bytes that this machine has."""
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def read(data: bytes, rules: Rules) -> tuple[Read, bool]:
  """What is in a file or in the first part of one; and whether it is all.

  Args:
    data: of the file.
    rules: what both sides know beforehand.

  Raises:
    UserError: if it is not such a file, or damaged.
  """
  header, at = read_header(data)
  S, N, D = header['codec']['steps'], header['images'], _count(header['shape'])
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
      of_step = np.zeros((N, D), np.int32)
      try:
        before = _one(coder, rules, len(size), before, None, of_step)
      except (ValueError, IndexError, OverflowError):
        raise errors.UserError(damaged(ends)) from None
      size.append(before)
      chosen.append(of_step)
    checks[len(size)], ends[len(size)] = check, end
  if len(size) == S and ends[S] != len(data):
    raise errors.UserError('it goes on after its end: it is damaged')
  told = np.array(size, np.int32).reshape(-1, N)
  indices = np.array(chosen, np.int32).reshape(-1, N, D)
  return Read(header, told, indices, checks, ends), len(size) == S


def chunks(
  data: bytes, at: int, total: int
) -> Iterator[tuple[int, bytes, int, int]]:
  """(steps, bits, check, where it ends) of each whole chunk from `at` on.

  Raises:
    UserError: if one is not what was written, or if all `total` bytes are there
      and more are wanted.
  """
  crc = int.from_bytes(data[at - 4 : at], 'big')
  ends, all_of_it = {0: at}, at + total
  while at < len(data):
    steps, after = _from_leb128(data, at)
    length, after = _from_leb128(data, after)
    end = after + length + 6
    if end > all_of_it:
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
  """What to say of a file that is good up to the last of `ends`."""
  good = list(ends.values())[-1]
  rest = f'; --bytes={good} shows what is whole' if len(ends) > 1 else ''
  return f'it is damaged after byte {good}{rest}'


def _one(
  coder: range_coder.Encoder | range_coder.Decoder,
  rules: Rules,
  step: int,
  before: np.ndarray,
  size: np.ndarray | None,
  chosen: np.ndarray,
) -> np.ndarray:
  """Tells one step of all images, or is told it: fills `chosen`, gives sizes.

  The size of a group is near that of the image's step before.
  """
  sending, told = size is not None, np.zeros(len(chosen), int)
  for n, row in enumerate(chosen):
    less = None if size is None else int(before[n] - size[n])
    zigzag = None if less is None else abs(2 * less) - (less > 0)
    zigzag = range_coder.unary(coder, ('size',), zigzag)
    told[n] = before[n] - (zigzag // 2 + 1 if zigzag % 2 else -zigzag // 2)
    if not 0 <= told[n] < len(rules.sizes):
      raise ValueError(f'no groups are of size number {told[n]}')
    m = rules.sizes[told[n]]
    level = max(-4, round(2 * math.log2(m * rules.expected[step])))
    for d in range(0, len(row), m):
      i = int(row[d]) if sending else None
      i = range_coder.whole(coder, ('index', level), i)
      if not sending:
        row[d : d + m] = i
  return told


def _leb128(n: int) -> bytes:
  low, rest = n & 127, n >> 7
  return bytes([low | 128]) + _leb128(rest) if rest else bytes([low])


def _from_leb128(data: bytes, at: int) -> tuple[int, int]:
  """The number at a byte, and where it ends; past the end if it is cut off."""
  n = 0
  for i, byte in enumerate(data[at : at + 5]):
    n |= (byte & 127) << 7 * i
    if byte < 128:
      return n, at + i + 1
  return 0, len(data)


def _count(shape: Sequence[int]) -> int:
  return math.prod(shape)
