"""Hashes of a data set, 16 bytes per image, to detect changes."""

import hashlib
import os
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np

# Bytes. Only ROWS rows of larger arrays are read.
MOST = 2 * 2**30
ROWS = 10_000


class Contents(NamedTuple):
  """Hashes, uint64 (n,) each.

  names: Hashes of the names of the images, ascending.
  marks: Hashes of the content of each, such as its size and label.
  """

  names: np.ndarray
  marks: np.ndarray


def of(items: Iterable[tuple[Any, Any]]) -> Contents:
  """Hashes pairs (name, content), by the `repr` of both."""
  pairs = [(_hash(name), _hash(mark)) for name, mark in items]
  table = np.array(sorted(pairs), np.uint64).reshape(-1, 2)
  return Contents(table[:, 0], table[:, 1])


def size(file: str) -> int:
  """Size of a file in bytes; -1 if it cannot be read."""
  try:
    return os.stat(file).st_size
  except OSError:
    return -1


def of_array(images: np.ndarray, marks: Sequence[Any]) -> Contents:
  """Hashes an array (n, ...) with a mark, such as a label, for each row.

  A row's name is its index. If the array has more than `MOST` bytes, only
  `ROWS` evenly spaced rows are read.
  """
  n = len(images)
  few = images.nbytes > MOST
  rows = (
    set(np.linspace(0, n - 1, min(n, ROWS), dtype=int)) if few else range(n)
  )

  def content(i: int) -> Any:
    data = np.ascontiguousarray(images[i]).tobytes() if i in rows else b''
    return hashlib.blake2b(data, digest_size=8).hexdigest(), marks[i]

  whole = str(images.dtype), images.shape[1:]
  return of([('array', whole), *((i, content(i)) for i in range(n))])


def changes(before: Contents, now: Contents) -> str:
  """Says how many images were added, removed and changed; '' if none."""
  there, here = ({*x.names.tolist()} for x in (before, now))
  marks = dict(zip(before.names.tolist(), before.marks.tolist(), strict=True))
  changed = sum(
    marks.get(name, mark) != mark
    for name, mark in zip(now.names.tolist(), now.marks.tolist(), strict=True)
  )
  counts = {
    'added': len(here - there),
    'removed': len(there - here),
    'changed': changed,
  }
  return ', '.join(f'{n} {what}' for what, n in counts.items() if n)


def _hash(value: Any) -> int:
  data = repr(value).encode(errors='surrogateescape')
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'big')
