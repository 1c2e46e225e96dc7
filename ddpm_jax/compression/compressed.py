"""Reads a compressed file with the recipe and the weights of a run."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import recipe
from ddpm_jax.compression import file_format
from ddpm_jax.compression import transmission
from ddpm_jax.storage import logs


def opened(
  path: pathlib.Path, limit: int | None = None
) -> tuple[bytes, dict[str, Any]]:
  """Returns the bytes of a file, at most `limit` of them, and its header.

  Raises:
    UserError: If it cannot be read, or is not a compressed file.
  """
  try:
    data = path.read_bytes()[:limit]
  except OSError as e:
    raise errors.UserError(f'--input={path}: {e.strerror}') from None
  with _of_file(path):
    header, _ = file_format.read_header(data)
  return data, header


def decoded(
  config: ConfigDict, data: bytes, header: dict[str, Any], path: pathlib.Path
) -> tuple[ConfigDict, file_format.Read, bool]:
  """Undoes the entropy code of a file.

  Returns:
    The recipe with the codec keys of the file, the contents of the file, and
    whether it is complete.

  Raises:
    UserError: If the file is damaged.
  """
  with _of_file(path):
    codec = {f'codec.{key}': value for key, value in header['codec'].items()}
    config = recipe.changed_copy(config, codec)
    rules = transmission.rules(config, header['squares'])
    read, complete = file_format.read(data, rules)
  return config, read, complete


@contextlib.contextmanager
def _of_file(path: pathlib.Path) -> Iterator[None]:
  """Adds the path to the messages of errors raised inside."""
  try:
    yield
  except errors.UserError as e:
    raise errors.UserError(f'{path}: {e}') from None


def check_same(
  config: ConfigDict, params: Any, header: dict[str, Any], path: pathlib.Path
) -> None:
  """Refuses a file of another model; warns if other software wrote it.

  Raises:
    UserError: If the shapes of the images or the weights differ.
  """
  shape = list(recipe.shape(config))
  if header['shape'] != shape:
    raise errors.UserError(
      f'{path} is of images {transmission.describe(header["shape"])}, and '
      f'this run is of images {transmission.describe(shape)}: set the '
      '--workdir that it was compressed with'
    )
  if header['model'] != transmission.model_digest(config, params):
    raise errors.UserError(
      f'{path} was written with other weights than the newest in this workdir: '
      'set the --workdir that it was compressed with'
    )
  here, there = transmission.software(), header['software']
  others = [
    f'{k} {errors.short(there.get(k, "unknown"))} -> {v}'
    for k, v in here.items()
    if there.get(k) != v
  ]
  if others:
    logs.say(
      f'{path} was written with other software ({", ".join(others)}): numbers '
      'may differ, which decoding detects'
    )
