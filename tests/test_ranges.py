"""Every key has a type and a range: kept on the edge, refused outside."""

import math

import pytest

from configs import base
from ddpm_jax import errors
from ddpm_jax import ranges
from ddpm_jax import recipe
from ddpm_jax import validate

FLAT = recipe.flatten(base.get_config())
NUMBERS = [k for k, r in ranges.KEYS.items() if r.kind in (int, float)]
WHOLE = [k for k in NUMBERS if ranges.KEYS[k].kind is int]
TUPLES = [k for k, r in ranges.KEYS.items() if r.lengths is not None]
COUNTS = [k for k in WHOLE if k not in TUPLES]


def in_a_tuple(key, value):
  """The value; twice, for a key that is a tuple."""
  return value if ranges.KEYS[key].lengths is None else (value, value)


def refused(key, value):
  """The message that a recipe with this value is refused with, or ''."""
  message = ''
  try:
    ranges.check(FLAT | {key: value})
  except errors.UserError as error:
    message = str(error)
  assert not message or f'config.{key}' in message
  assert '\n' not in message
  return message


def test_every_key_of_the_base_recipe_has_a_type_and_a_range():
  assert set(FLAT) <= set(ranges.KEYS)
  ranges.check(FLAT)
  for key, value in FLAT.items():
    allowed = ranges.KEYS[key]
    one = value[0] if isinstance(value, tuple) and value else value
    assert one == () or allowed.is_of_kind(one), key
    assert (allowed.lengths is not None) == isinstance(value, tuple) or (
      allowed.alone
    ), key


def edges(key):
  """(value, whether it is allowed) at and just outside of both bounds."""
  r = ranges.KEYS[key]
  for bound, is_open, away in (
    (r.low, r.open_low, -1),
    (r.high, r.open_high, 1),
  ):
    if not math.isfinite(bound):
      continue
    if r.kind is int:
      yield bound, True
      yield bound + away, bound + away in r.also
    else:
      outside = math.nextafter(bound, away * math.inf)
      yield bound, not is_open
      yield outside, False
      yield math.nextafter(bound, -away * math.inf), True
  for value in r.also:
    yield value, True


@pytest.mark.parametrize('key', NUMBERS)
def test_a_number_is_allowed_on_the_edge_and_refused_outside(key):
  found = list(edges(key))
  assert len(found) >= 2  # nothing is without bounds
  for value, allowed in found:
    assert (not refused(key, in_a_tuple(key, value))) == allowed, value


@pytest.mark.parametrize('key', NUMBERS)
@pytest.mark.parametrize('value', [None, True, '4', math.nan, math.inf])
def test_what_is_no_finite_number_is_refused(key, value):
  assert refused(key, in_a_tuple(key, value))


@pytest.mark.parametrize('key', WHOLE)
def test_a_fraction_is_no_integer(key):
  assert refused(key, in_a_tuple(key, 4.0))
  assert refused(key, in_a_tuple(key, 4.5))


@pytest.mark.parametrize('key', [k for k in ranges.KEYS if k not in NUMBERS])
def test_flags_and_strings_are_nothing_else(key):
  for value in (None, 1, 0.5):
    assert refused(key, in_a_tuple(key, value))
  if ranges.KEYS[key].choices:
    assert refused(key, 'none of them')


def test_tuples_are_of_the_lengths_that_they_may_have():
  assert refused('model.multipliers', ())
  assert refused('model.multipliers', 2)
  assert refused('model.multipliers', (1, 1.5))
  assert not refused('model.attention', ())
  assert not refused('data.image_size', ())
  assert not refused('data.image_size', (16, 24))
  assert refused('data.image_size', (16,))
  assert refused('data.image_size', (16, 24, 32))
  assert refused('data.image_size', (16, 0))
  assert refused('sampler.guidance_interval', (0.1,))


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('optimizer.ema', 2, 'ema=2 must be at least 0 and below 1'),
    ('optimizer.ema', 2.0, 'ema=2 must be at least 0 and below 1'),
    ('optimizer.ema', None, 'ema=None must be a number, at least 0 and below'),
    ('steps', 0, 'config.steps=0 must be at least 1'),
    ('steps', 1.5, 'config.steps=1.5 must be an integer, at least 1'),
    ('parallel.data', 0, 'data=0 must be at least 1, or -1'),
    ('data.flip', 1, 'flip=1 must be true or false'),
    ('data.path', None, 'path=None must be a string'),
    ('model.dtype', 'float16', 'known: bfloat16, float32'),
    ('model.multipliers', (1, 1.5), r'multipliers=(1, 1.5) must be like (1, 2'),
    ('model.multipliers', (), r'multipliers=() must be like (1, 2'),
  ],
)
def test_the_message_says_what_the_key_must_be(key, value, message):
  assert message in refused(key, value)


def test_a_key_of_a_users_own_may_be_anything():
  ranges.check(FLAT | {'mine.number': None})


def test_flags_are_held_to_their_ranges_too():
  ranges.check_flags({'seed': 2**32 - 1, 'step': 0, 'strength': 1.0})
  ranges.check_flags({'seed': None})
  for name, value in (
    ('seed', 2**32),
    ('seed', -1),
    ('num_samples', 0),
    ('bytes', -1),
    ('step', -1),
    ('strength', 0.0),
    ('strength', math.nan),
    ('process_id', -1),
  ):
    with pytest.raises(errors.UserError, match=f'--{name}='):
      ranges.check_flags({name: value})


def test_basics_hold_a_recipe_of_any_making_to_it():
  c = base.get_config()
  c.optimizer.ema = 1.0
  with pytest.raises(errors.UserError, match=r'optimizer\.ema=1 '):
    validate.check(c)
