"""A source: images by index, decoded once if they fit in memory."""

import concurrent.futures
import dataclasses
import logging
import os
import threading
from collections.abc import Callable

import numpy as np
import tqdm

from ddpm_jax import errors
from ddpm_jax.data import contents
from ddpm_jax.data import decode

# Bytes of pixels that are kept in memory: 700,000 images of 32 x 32, or 10,000
# of 256 x 256. Training hosts have room for it in each of eight processes.
MEMORY = 2 * 2**30

_CHUNK = 64  # images that a thread decodes before it reports

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
  """`length` images, read by index.

  Attributes:
    gather: int (b,) -> dict(image=uint8 (b, H, W, C), label=int32 (b,),
      id=int32 (b,)). label is -1 for none; id is the image's number in the
      listing, which counts unreadable images too. Points are float32 (b, 2).
    class_names: Names of the labels 0, 1, ...; () without labels.
    captions: Captions of each id; () without captions.
    max_value: Value of the files that becomes 255, for 16-bit images; else 0.
    held: Returns hashes of the data, to detect changes.
  """

  length: int
  gather: Callable[[np.ndarray], Batch]
  class_names: tuple[str, ...] = ()
  captions: tuple[tuple[str, ...], ...] = ()
  max_value: int = 0
  held: Callable[[], contents.Contents] = lambda: contents.of([])

  def __len__(self) -> int:
    return self.length


@dataclasses.dataclass(frozen=True)
class Files:
  """Images that are not decoded yet.

  Attributes:
    read: index -> (uint8 (H, W, C), label); may raise anything.
    name: index -> name of the image for messages.
  """

  length: int
  read: Callable[[int], tuple[np.ndarray, int]]
  name: Callable[[int], str]
  class_names: tuple[str, ...] = ()


def from_arrays(
  images: np.ndarray,
  labels: np.ndarray,
  class_names: tuple[str, ...] = (),
  ids: np.ndarray | None = None,
) -> Source:
  """Makes a source of images (n, ...), maybe mapped, and int32 labels (n,)."""
  ids = np.arange(len(labels), dtype=np.int32) if ids is None else ids

  def gather(indices: np.ndarray) -> Batch:
    return {
      'image': np.asarray(images[indices]),
      'label': labels[indices],
      'id': ids[indices],
    }

  def found() -> contents.Contents:
    named = [*class_names, -1] if class_names else None
    marks = [named[i] for i in labels] if named else labels.tolist()
    return contents.of_array(images, marks)

  return Source(len(labels), gather, class_names, held=found)


def relabelled(source: Source, names: tuple[str, ...]) -> Source:
  """Renumbers the classes of a source as in `names`, which has them all."""
  number = {name: i for i, name in enumerate(names)}
  # The last entry is for -1, no label.
  new = np.array([*(number[x] for x in source.class_names), -1], np.int32)

  def gather(indices: np.ndarray) -> Batch:
    batch = source.gather(indices)
    return {**batch, 'label': new[batch['label']]}

  return dataclasses.replace(source, gather=gather, class_names=names)


def from_files(
  files: Files, shape: decode.Shape, max_unreadable: int
) -> Source:
  """Makes a source that decodes all images now, if they fit in `MEMORY`.

  Otherwise images are decoded at every gather. An unreadable image is logged as
  a warning and left out. At a gather it is too late for that: the next readable
  image replaces it, with its label, the same in every process and every run.

  Raises:
    UserError: If more than `max_unreadable` images are unreadable, or all are.
  """
  once = files.length * int(np.prod(shape)) <= MEMORY
  failed = _failures(max_unreadable)
  return (_decode_now if once else _decode_late)(files, shape, failed)


def _decode_now(
  files: Files, shape: decode.Shape, failed: Callable[[str, Exception], None]
) -> Source:
  images = np.empty((files.length, *shape), np.uint8)
  labels = np.full(files.length, -1, np.int32)
  good = np.zeros(files.length, bool)

  def work(first: int) -> int:
    chunk = range(first, min(first + _CHUNK, files.length))
    for i in chunk:
      try:
        images[i], labels[i] = files.read(i)
        good[i] = True
      except Exception as error:  # Pillow raises many types
        failed(files.name(i), error)
    return len(chunk)

  from ddpm_jax.storage import logs  # imports JAX

  # None: shown in a terminal.
  quiet = None if logs.is_shown() else True
  with (
    _pool() as pool,
    tqdm.tqdm(
      desc='decoding', total=files.length, unit=' images', disable=quiet
    ) as bar,
  ):
    for done in pool.map(work, range(0, files.length, _CHUNK)):
      bar.update(done)
  if not good.any():
    raise _nothing_left(files)
  ids = np.flatnonzero(good).astype(np.int32)
  if not good.all():
    images, labels = images[good], labels[good]
  return from_arrays(images, labels, files.class_names, ids)


def _decode_late(
  files: Files, shape: decode.Shape, failed: Callable[[str, Exception], None]
) -> Source:
  pool = _pool()

  def read(first: int) -> tuple[np.ndarray, int, int]:
    for i in range(first, first + files.length):
      i %= files.length
      try:
        return *files.read(i), i
      except Exception as error:  # Pillow raises many types
        failed(files.name(i), error)
    raise _nothing_left(files)

  def gather(indices: np.ndarray) -> Batch:
    images = np.empty((len(indices), *shape), np.uint8)
    labels, ids = np.empty((2, len(indices)), np.int32)
    for row, found in enumerate(pool.map(read, indices.tolist())):
      images[row], labels[row], ids[row] = found
    return {'image': images, 'label': labels, 'id': ids}

  return Source(files.length, gather, files.class_names)


def _pool() -> concurrent.futures.ThreadPoolExecutor:
  # More threads would only wait for Python's GIL.
  return concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1))


def _failures(limit: int) -> Callable[[str, Exception], None]:
  """Returns a function that logs unreadable images; it raises after `limit`."""
  seen: dict[str, None] = {}
  lock = threading.Lock()

  def failed(name: str, error: Exception) -> None:
    with lock:
      if name not in seen:
        seen[name] = None
        reason = ' '.join(str(error).split()) or type(error).__name__
        logging.getLogger(__name__).warning(
          'unreadable image left out: %s (%s)', name, reason
        )
      if len(seen) > limit:
        raise errors.UserError(
          f'more than {limit} images are unreadable, such as '
          f'{", ".join(list(seen)[:3])}; fix or remove them, or raise '
          '--config.data.max_unreadable'
        )

  return failed


def _nothing_left(files: Files) -> errors.UserError:
  return errors.UserError(
    f'none of the {files.length} images could be read, such as '
    f'{files.name(0)}; fix them'
  )
