"""Inception features of many images, computed by all processes.

Each process uses a mesh of its own devices and its own share of the batches.
Results are exchanged through files in a folder that all processes can read.
"""

import functools
import math
import pathlib
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import npz
from ddpm_jax.metrics import fidelity
from ddpm_jax.metrics import inception
from ddpm_jax.parallel import engines
from ddpm_jax.parallel import meshes
from ddpm_jax.parallel import processes
from ddpm_jax.storage import logs
from ddpm_jax.storage import paths

# Images per device and batch: half a gigabyte of activations.
AT_ONCE = 32

Extract = Callable[[np.ndarray], inception.Features]
Span = tuple[int, int]  # indices of images: start, stop


def extractor(
  config: ConfigDict, engine: engines.Engine, params: Any, batch: int
) -> Extract:
  """Compiles uint8 (b, H, W, 1 or 3), b ≤ `batch` -> features (NumPy)."""
  n = engine.mesh.size
  size = min(AT_ONCE, math.ceil(batch / n)) * n
  params = jax.device_put(params, meshes.replicated(engine.mesh))
  compiled = engine.compile_map(features(config), params, name='Inception')

  def extract(images: np.ndarray) -> inception.Features:
    parts = []
    for start in range(0, len(images), size):
      part = images[start : start + size]
      # The last part is padded, so that one program does for all.
      full = np.zeros((size, *images.shape[1:]), np.uint8)
      full[: len(part)] = part
      parts.append(compiled(params, engine.put(full)))
    n = len(images)
    return jax.tree.map(lambda *x: np.concatenate(x)[:n], *parts)

  return extract


def features(config: ConfigDict) -> Callable[[Any, jax.Array], Any]:
  """Returns (Inception's weights, uint8 (B, H, W, 1 or 3)) -> features."""
  prepare = build.member(inception, config.evaluate.resize, 'resize')

  def apply(params: Any, images: jax.Array) -> inception.Features:
    B, H, W, _ = images.shape
    images = jnp.broadcast_to(images, (B, H, W, 3))  # gray to RGB
    return inception.Inception().apply({'params': params}, prepare(images))  # type: ignore[return-value]

  return apply


def spans(count: int, size: int) -> list[Span]:
  """Splits `count` images into batches; the last may be smaller."""
  return [(i, min(i + size, count)) for i in range(0, count, size)]


def of_source(
  source: Any, count: int, size: int, extract: Extract
) -> Iterator[tuple[Span, inception.Features]]:
  """Features of this process's share of the first `count` images."""
  share = spans(count, size)[jax.process_index() :: jax.process_count()]
  total = sum(stop - start for start, stop in share)
  with logs.Progress('features', total) as bar:
    for start, stop in share:
      index = np.arange(start, stop, dtype=np.int32)
      yield (start, stop), extract(source.gather(index)['image'])
      bar.update(stop - start)


def add_up(
  parts: Iterable[tuple[Span, inception.Features]], kept: np.ndarray
) -> fidelity.Sums | None:
  """Sums over all parts, in order; None if there are none."""
  total = None
  for span, features in parts:
    part = fidelity.sums(np.arange(*span), features, kept)
    total = part if total is None else fidelity.merge(total, part)
  return total


def everyones(
  mine: fidelity.Sums | None, folder: pathlib.Path
) -> fidelity.Sums:
  """Sums over all processes, exchanged through files in a folder.

  The file names are unique to this evaluation: others may use the folder.
  """
  if jax.process_count() == 1:
    assert mine
    return mine
  name, count = processes.shared_name(), jax.process_count()
  files = [folder / f'.sums_{name}_of_{i}' for i in range(count)]
  own = files[jax.process_index()]
  if mine:
    with paths.atomic_write(own) as part, part.open('wb') as written:
      np.savez(written, *jax.tree.leaves(mine))
  processes.wait('sums written')
  parts = []
  for file in files:
    if file.exists():
      with file.open('rb') as whole:
        arrays = npz.load(whole)
      parts.append(jax.tree.unflatten(fidelity.TREE, arrays.values()))
  processes.wait('sums read')
  own.unlink(missing_ok=True)
  return functools.reduce(fidelity.merge, parts)


def in_parts(
  folder: pathlib.Path,
  batches: list[Span],
  make: Callable[[int, int], np.ndarray],
  extract: Extract,
  keep_images: bool,
) -> None:
  """Draws this process's share of the images, and saves their features.

  Each batch is a file in `folder`; existing files are kept. Returns when the
  files of all processes exist.
  """
  folder.mkdir(parents=True, exist_ok=True)
  share = batches[jax.process_index() :: jax.process_count()]
  done = [span for span in share if _file(folder, span).exists()]
  before = sum(stop - start for start, stop in done)
  total = sum(stop - start for start, stop in share)
  if done:
    logs.say(f'resuming after {before} images')
  with logs.Progress('drawing', total, initial=before) as bar:
    for start, stop in share:
      if (start, stop) in done:
        continue
      images = make(start, stop)
      arrays = extract(images)._asdict()
      if keep_images:
        arrays['images'] = images
      path = _file(folder, (start, stop))
      with paths.atomic_write(path) as part, part.open('wb') as file:
        np.savez(file, **arrays)
      bar.update(stop - start)
  processes.wait('features written')


def parts(
  folder: pathlib.Path, batches: list[Span]
) -> Iterator[tuple[Span, inception.Features]]:
  """Reads the features that `in_parts` saved."""
  for span in batches:
    names = inception.Features._fields
    with _file(folder, span).open('rb') as file:
      arrays: Any = npz.load(file, names.__contains__)
    yield span, inception.Features(**arrays)


def images(folder: pathlib.Path, batches: list[Span]) -> Iterator[np.ndarray]:
  for span in batches:
    with _file(folder, span).open('rb') as file:
      yield npz.load(file, 'images'.__eq__)['images']


def _file(folder: pathlib.Path, span: Span) -> pathlib.Path:
  return folder / f'{span[0]:08d}-{span[1]:08d}.npz'
