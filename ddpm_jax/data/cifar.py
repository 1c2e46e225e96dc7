"""Prepares CIFAR-10 for TFDS, without TensorFlow.

The files are the same as those that TFDS writes, in the same order:
`tfds.data_source('cifar10', ...)` reads them, here and elsewhere.
"""

import contextlib
import hashlib
import http.client
import io
import logging
import os
import pathlib
import queue
import tarfile
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from PIL import Image

from ddpm_jax import errors

ARCHIVE = 'cifar-10-binary.tar.gz'
URL = f'https://www.cs.toronto.edu/~kriz/{ARCHIVE}'
SHA256 = 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'

_INSIDE = 'cifar-10-batches-bin/'
_FILES = {
  'train': [f'data_batch_{i}.bin' for i in range(1, 6)],
  'test': ['test_batch.bin'],
}
_ROW = 1 + 3 * 32 * 32  # bytes: the label, then the planes R, G and B


def prepare(
  root: str | os.PathLike,
  *,
  url: str = URL,
  sha256: str = SHA256,
  timeout: float = 5.0,
) -> None:
  """Writes root/cifar10/3.0.2 from the archive in `root`.

  The archive may also be in root/downloads/manual, and is downloaded to there
  if it is in neither folder. `timeout` is the longest silence of the server, in
  s.

  Raises:
    UserError: If the archive cannot be downloaded, or its hash is not `sha256`.
  """
  root = pathlib.Path(root)
  manual = root / 'downloads' / 'manual' / ARCHIVE
  places = [path for path in (root / ARCHIVE, manual) if path.is_file()]
  try:
    if places:
      _check(places[0], sha256)
    else:
      _download(url, manual, sha256, timeout)
    _write(root, (places or [manual])[0])
  except OSError as error:
    raise errors.UserError(
      f'CIFAR-10 cannot be prepared in {root} ({error}); fix that, or set '
      '--config.data.path to another folder'
    ) from error


def _write(root: pathlib.Path, archive: pathlib.Path) -> None:
  builder = _cifar10(archive)(data_dir=root, file_format='array_record')
  # TFDS nests progress bars and prints to stdout; we show one bar instead.
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare()
  except OSError:
    # Another process may have prepared the same folder first.
    if not (builder.data_path / 'dataset_info.json').exists():
      raise


def _cifar10(archive: pathlib.Path) -> Any:
  """TFDS's builder of CIFAR-10, reading from the archive."""

  class Cifar10(tfds.image_classification.Cifar10, skip_registration=True):  # type: ignore[call-arg]
    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
      with tarfile.open(archive) as tar:
        files = {
          member.name.removeprefix(_INSIDE): tar.extractfile(member).read()  # type: ignore[union-attr]
          for member in tar
          if member.isfile()
        }
      names = files['batches.meta.txt'].decode().split()
      self.info.features['label'].names = names
      return {
        split: _examples(split, b''.join(files[name] for name in parts))
        for split, parts in _FILES.items()
      }

  return Cifar10


def _examples(split: str, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields TFDS's keys, which determine the order, and examples."""
  rows = np.frombuffer(data, np.uint8).reshape(-1, _ROW)
  bar = tqdm.tqdm(rows, f'preparing {split}', unit=' images', disable=None)
  for key, row in enumerate(bar):
    image = row[1:].reshape(3, 32, 32).transpose(1, 2, 0)
    yield (
      key,
      {
        'id': f'{split}_{key:05d}',
        # TFDS would encode an array with TensorFlow.
        'image': Image.fromarray(np.ascontiguousarray(image)),
        'label': int(row[0]),
      },
    )


def _check(path: pathlib.Path, sha256: str) -> None:
  with path.open('rb') as file:
    found = hashlib.file_digest(file, 'sha256').hexdigest()
  if found != sha256:
    raise errors.UserError(
      f'{path} is damaged or another file: sha256 {found} '
      f'({path.stat().st_size} bytes), expected {sha256}; replace it '
      f'by {URL}'
    )


def _download(
  url: str, path: pathlib.Path, sha256: str, timeout: float
) -> None:
  """Downloads to `path`, which appears only if its hash is right."""
  logging.getLogger(__name__).info('downloading %s to %s', url, path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    part = pathlib.Path(folder) / path.name
    try:
      with _open(url, timeout) as reply, part.open('wb') as file:
        _copy(reply, file)
    except (OSError, http.client.HTTPException) as error:
      raise errors.UserError(
        f'cannot download {url} ({error}); download it by hand, and put it in '
        f'{path.parent}'
      ) from error
    _check(part, sha256)
    part.replace(path)


def _open(url: str, timeout: float) -> Any:
  """`urlopen` with a timeout that also covers name resolution.

  It runs in a thread, because name resolution has no timeout; the thread is a
  daemon, so that it does not delay the exit.
  """
  answers: queue.SimpleQueue = queue.SimpleQueue()

  def ask() -> None:
    try:
      answers.put(urllib.request.urlopen(url, timeout=timeout))
    except Exception as error:
      answers.put(error)

  threading.Thread(target=ask, daemon=True).start()
  try:
    answer = answers.get(timeout=2 * timeout)
  except queue.Empty:
    raise TimeoutError(f'no answer in {2 * timeout:g} s') from None
  if isinstance(answer, Exception):
    raise answer
  return answer


def _copy(reply: Any, file: Any) -> None:
  size = int(reply.headers.get('Content-Length') or 0) or None
  with tqdm.tqdm(
    desc=ARCHIVE, total=size, unit='B', unit_scale=True, disable=None
  ) as bar:
    while block := reply.read(2**20):
      file.write(block)
      bar.update(len(block))
