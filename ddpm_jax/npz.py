"""Reads NumPy files, .npz and .npy, safely.

Pickles are never loaded. Memory is allocated only after the header of an array
has been checked against the length of the file and the limits here.
"""

import io
import math
import os
import zipfile
from collections.abc import Callable
from typing import Any
from typing import BinaryIO

import numpy as np

from ddpm_jax import regular

MAX_BYTES = 2**34  # of the arrays of an .npz, which are read into memory
MAX_MEMBERS = 100_000
_MAX_RATIO = 1040  # of sizes before and after Deflate
_KINDS = 'biufcUS'  # kinds of dtypes: booleans, numbers and strings
_MAX_HEADER = 10_000  # bytes; NumPy's own limit


def is_npz(path: str | os.PathLike) -> bool:
  """Whether the file begins like a zip file; if not, it may be a .npy."""
  with regular.opened(path) as file:
    return file.read(2) == b'PK'


def load(
  source: str | os.PathLike | BinaryIO,
  wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, np.ndarray]:
  """Returns {name: array} of an .npz, of the names that `wanted` accepts.

  Raises:
    OSError: If the file cannot be read.
    ValueError: If it is damaged or too large. zipfile and zlib raise errors of
      their own types too.
  """
  if isinstance(source, str | os.PathLike):
    with regular.opened(source) as file:
      return load(file, wanted)
  _check_directory(source)
  with zipfile.ZipFile(source) as archive:
    members = {
      x.filename.removesuffix('.npy'): x
      for x in archive.infolist()
      if x.filename.endswith('.npy')
    }
    members = {name: x for name, x in members.items() if wanted(name)}
    total = sum(x.file_size for x in members.values())
    if total > min(MAX_BYTES, _memory()):
      raise ValueError(
        f'its arrays have {total} bytes; at most '
        f'{min(MAX_BYTES, _memory())} are read'
      )
    return {name: _member(archive, x) for name, x in members.items()}


def names(source: str | os.PathLike | BinaryIO) -> list[str]:
  """Returns the names of the arrays of an .npz; raises what `load` raises."""
  if isinstance(source, str | os.PathLike):
    with regular.opened(source) as file:
      return names(file)
  _check_directory(source)
  with zipfile.ZipFile(source) as archive:
    found = [x for x in archive.namelist() if x.endswith('.npy')]
    return [name.removesuffix('.npy') for name in found]


def mapped(path: str | os.PathLike) -> np.ndarray:
  """Returns the array of a .npy, memory-mapped.

  Raises:
    OSError: If the file cannot be read.
    ValueError: If it is not a .npy.
  """
  with regular.opened(path) as file:
    total = regular.length(file)
    start, shape, fortran, dtype = _header(file)
  size = math.prod(shape) * dtype.itemsize
  if size > total - start:
    raise ValueError(
      f'its header says {size} bytes, shape {shape}, but {total - start} follow'
    )
  order: Any = 'F' if fortran else 'C'
  if not size:
    return np.zeros(shape, dtype)
  return np.memmap(path, dtype, 'r', start, shape, order)


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
  name, size = member.filename, member.file_size
  if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise ValueError(f'{name} is compressed in a way that NumPy does not use')
  if size > _MAX_RATIO * (member.compress_size + 1):
    raise ValueError(
      f'{name} cannot have {size} bytes: {member.compress_size} compressed '
      'bytes do not hold that many'
    )
  with archive.open(member) as file:
    start, shape, _, dtype = _header(file)
  asked = math.prod(shape) * dtype.itemsize
  if asked != size - start:
    raise ValueError(
      f'the header of {name} says {asked} bytes, shape {shape}, but '
      f'{size - start} follow'
    )
  with archive.open(member) as file:
    return np.lib.format.read_array(file, allow_pickle=False)


def _header(file: Any) -> tuple[int, tuple[int, ...], bool, np.dtype]:
  """Returns (offset of the data, shape, Fortran order, dtype) of a .npy."""
  magic = file.read(10)
  if magic[:6] != b'\x93NUMPY' or magic[6:8] not in (b'\1\0', b'\2\0'):
    raise ValueError('it is not a .npy file of version 1 or 2')
  if magic[6] == 2:
    magic += file.read(2)
  length = int.from_bytes(magic[8:], 'little')
  if length > _MAX_HEADER:
    raise ValueError(f'its header has {length} bytes')
  head = io.BytesIO(magic[8:] + file.read(length))
  try:
    read = np.lib.format.read_array_header_1_0
    if magic[6] == 2:
      read = np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(head)
  except (MemoryError, RecursionError):  # ast raises them for deep nesting
    raise ValueError('its header is not valid') from None
  if dtype.hasobject:
    raise ValueError('it holds Python objects, which are never loaded')
  if dtype.kind not in _KINDS or not dtype.itemsize:
    raise ValueError(f'it holds {dtype}, not numbers or strings')
  if len(shape) > 32 or any(not 0 <= side < 2**63 for side in shape):
    raise ValueError(f'no array has the shape {shape!s:.80}')
  return len(magic) + length, shape, fortran, dtype


def _check_directory(file: BinaryIO) -> None:
  """Refuses a zip file whose directory of members is too large to read."""
  size = regular.length(file)
  file.seek(max(0, size - 2**16 - 22))
  tail = file.read()
  at = tail.rfind(b'PK\5\6')
  listed = int.from_bytes(tail[at + 12 : at + 16], 'little')
  if at >= 0 and listed > 100 * MAX_MEMBERS:
    raise ValueError(f'its directory of members has {listed} bytes')
  file.seek(0)


def _memory() -> int:
  """Returns the bytes of memory of this machine."""
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
