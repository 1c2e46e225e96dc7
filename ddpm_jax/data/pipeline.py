"""The order of the images, and the batches of one process."""

import grain
import numpy as np

from ddpm_jax import errors
from ddpm_jax.data import store


def batches(
  source: store.Source,
  *,
  batch_size: int,
  seed: int,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """Iterates over this process's rows of the batches `start`, `start` + 1, ...

  An item is a batch of the source (image: uint8 (b, H, W, C), label and id:
  int32 (b,), perhaps text) and index: int32 (b,), the row in the global batch;
  b = batch_size / process_count. Every epoch has a new order, and a batch may
  span two epochs. The iterator is infinite.

  The rows of all processes, concatenated, are the batch of a single process,
  and the state (`get_state`, `set_state`; JSON) is the same for all of them.

  Raises:
    UserError: If `batch_size` is not a multiple of `process_count`.
  """
  if batch_size < 1 or batch_size % process_count:
    raise errors.UserError(
      f'a batch of {batch_size} cannot be divided among {process_count} '
      'processes; set --config.batch_size to a multiple of that'
    )
  b = batch_size // process_count
  index = process_index * b + np.arange(b, dtype=np.int32)

  def read(indices: np.ndarray) -> store.Batch:
    return {**source.gather(np.asarray(indices)), 'index': index}

  order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
  rows = order.batch(b)[process_index::process_count]
  iterator = iter(
    rows.map(read).to_iter_dataset(
      grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    )
  )
  iterator.set_state(position(start))
  return iterator


def position(batch: int) -> dict[str, int]:
  """Returns the state of an iterator whose next item is `batch`."""
  return {'next_index': batch}
