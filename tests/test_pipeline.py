"""The order of the images is one, however many read it."""

import itertools
import json

import numpy as np
import pytest

from ddpm_jax import errors
from ddpm_jax.data import pipeline
from ddpm_jax.data import store

pytestmark = pytest.mark.smoke


def numbered(n):
  """A source of n images, whose labels are their indices."""
  labels = np.arange(n, dtype=np.int32)
  images = np.zeros((n, 2, 2, 1), np.uint8) + labels[:, None, None, None] % 256
  return store.from_arrays(images.astype(np.uint8), labels)


def draw(iterator, count):
  return list(itertools.islice(iterator, count))


def labels(batches):
  return np.stack([batch['label'] for batch in batches])


def test_a_batch_has_the_promised_shapes_and_types():
  batch = next(pipeline.batches(numbered(20), batch_size=6, seed=0))
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    'image': ((6, 2, 2, 1), 'uint8'),
    'label': ((6,), 'int32'),
    'id': ((6,), 'int32'),
    'index': ((6,), 'int32'),
  }
  np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])


@pytest.mark.parametrize('count', [2, 4])
def test_processes_together_read_the_batches_of_one(count):
  source = numbered(21)  # epochs do not end where batches do
  whole = draw(pipeline.batches(source, batch_size=8, seed=1), 12)
  parts = [
    draw(
      pipeline.batches(
        source,
        batch_size=8,
        seed=1,
        process_index=i,
        process_count=count,
      ),
      12,
    )
    for i in range(count)
  ]
  for step, batch in enumerate(whole):
    for key, value in batch.items():
      together = np.concatenate([part[step][key] for part in parts])
      np.testing.assert_array_equal(together, value)


def test_index_is_the_row_in_the_global_batch():
  batches = pipeline.batches(
    numbered(20), batch_size=8, seed=0, process_index=3, process_count=4
  )
  for batch in draw(batches, 3):
    np.testing.assert_array_equal(batch['index'], [6, 7])


def test_every_image_comes_once_an_epoch_in_an_order_of_its_own():
  seen = labels(draw(pipeline.batches(numbered(21), batch_size=7, seed=0), 9))
  epochs = seen.reshape(3, 21)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(21))
  assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_set_smaller_than_the_batch_fills_it_by_repetition():
  seen = labels(draw(pipeline.batches(numbered(3), batch_size=12, seed=0), 2))
  assert (np.bincount(seen[0]) == 4).all()


def test_the_seed_settles_the_order():
  def order(seed):
    return labels(
      draw(pipeline.batches(numbered(50), batch_size=10, seed=seed), 5)
    ).tolist()

  assert order(3) == order(3)
  assert order(3) != order(4)


def test_a_state_resumes_where_it_was_taken_in_every_process():
  def open_one(i):
    return pipeline.batches(
      numbered(21), batch_size=8, seed=2, process_index=i, process_count=2
    )

  first = open_one(0)
  draw(first, 5)
  state = json.loads(json.dumps(first.get_state()))
  for i in range(2):
    uninterrupted = draw(open_one(i), 9)[5:]
    resumed = open_one(i)
    resumed.set_state(state)
    np.testing.assert_array_equal(
      labels(draw(resumed, 4)), labels(uninterrupted)
    )


def test_two_processes_go_on_in_the_middle_of_the_shuffle_of_one():
  def open_one(**share):
    return pipeline.batches(numbered(21), batch_size=8, seed=2, **share)

  one = open_one()
  draw(one, 5)
  state = json.loads(json.dumps(one.get_state()))
  parts = []
  for i in range(2):
    part = open_one(process_index=i, process_count=2)
    part.set_state(state)
    parts.append(labels(draw(part, 6)))
  rest = labels(draw(one, 6))
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), rest)
  # After 40 images the second epoch has two left, and then come two others.
  third, fourth = rest.ravel()[2:44].reshape(2, 21)
  for epoch in (third, fourth):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(21))
  assert np.any(third != fourth)


def test_start_is_as_if_so_many_batches_had_been_drawn():
  def open_at(start):
    return pipeline.batches(numbered(2001), batch_size=8, seed=2, start=start)

  drawn = open_at(0)
  skipped = draw(drawn, 1000)
  jumped = open_at(990)
  np.testing.assert_array_equal(labels(draw(jumped, 10)), labels(skipped[990:]))
  assert jumped.get_state() == drawn.get_state()
  next(open_at(10**12))  # no batch is drawn to get there


def test_a_batch_that_cannot_be_shared_out_is_an_error():
  with pytest.raises(errors.UserError, match=r'batch of 6 .* 4 processes'):
    pipeline.batches(numbered(9), batch_size=6, seed=0, process_count=4)


def test_an_error_of_the_source_reaches_the_loop():
  def gather(indices):
    raise errors.UserError('mend me')

  batches = pipeline.batches(store.Source(5, gather), batch_size=2, seed=0)
  with pytest.raises(errors.UserError, match='mend me'):
    next(batches)
