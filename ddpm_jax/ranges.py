"""The type and the range of every key of a recipe, and of numeric flags."""

import math
from collections.abc import Collection
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

from ddpm_jax import errors

LARGEST = 2**31 - 1  # the limit of counters and indices
TYPES = {
  int: 'an integer',
  float: 'a number',
  bool: 'true or false',
  str: 'a string',
  dict: 'an object',
}


class Range(NamedTuple):
  """The values that a key may have: one value, or a tuple of such values.

  Attributes:
    kind: int, float, bool, str or dict; an integer is a float too.
    low: The lower bound of a number.
    high: The upper bound of a number.
    open_low: Whether the number must be above `low`, not equal to it.
    open_high: Whether the number must be below `high`, not equal to it.
    also: Numbers outside of the bounds that are allowed too.
    lengths: Allowed lengths of a tuple; None if the key is not a tuple.
    alone: Whether one value may be given in place of a tuple.
    choices: Allowed strings; () for any.
    like: An example of a tuple, for messages.
  """

  kind: type
  low: float = -math.inf
  high: float = math.inf
  open_low: bool = False
  open_high: bool = False
  also: tuple[float, ...] = ()
  lengths: Collection[int] | None = None
  alone: bool = False
  choices: tuple[str, ...] = ()
  like: str = ''

  def holds(self, value: Any) -> bool:
    """Whether `value` is allowed."""
    several = isinstance(value, tuple | list)
    if self.lengths is None or (self.alone and not several):
      return self._is_one(value)
    if not several or len(value) not in self.lengths:
      return False
    return all(self._is_one(x) for x in value)

  def is_of_kind(self, value: Any) -> bool:
    if self.kind in (bool, str, dict):
      return isinstance(value, self.kind)
    kinds = int if self.kind is int else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool)

  def _is_one(self, value: Any) -> bool:
    if not self.is_of_kind(value):
      return False
    if self.kind is str:
      return not self.choices or value in self.choices
    if self.kind in (bool, dict) or value in self.also:
      return True
    above = value > self.low if self.open_low else value >= self.low
    below = value < self.high if self.open_high else value <= self.high
    # An integer is finite, but may be too large for `math.isfinite`.
    return above and below and (isinstance(value, int) or math.isfinite(value))

  def describe(self, value: Any) -> str:
    """Returns the end of a message that begins with 'must be'."""
    if self.lengths is not None:
      return f'like {self.like}'
    if self.kind in (bool, str, dict):
      return TYPES[self.kind]
    bounds = self._bounds(value)
    named = not bounds or not self.is_of_kind(value)
    parts = [TYPES[self.kind], *bounds] if named else bounds
    return f'{parts[0]}, {parts[1]}' if len(parts) == 2 else parts[0]

  def _bounds(self, value: Any) -> list[str]:
    # The bound `LARGEST` is mentioned only if `value` exceeds it.
    beyond = self.is_of_kind(value) and value > LARGEST
    parts = []
    if self.low > -math.inf:
      words = 'above' if self.open_low else 'at least'
      parts.append(f'{words} {written(self.low)}')
    if self.high < math.inf and (self.high != LARGEST or beyond):
      words = 'below' if self.open_high else 'at most'
      parts.append(f'{words} {written(self.high)}')
    or_also = ''.join(f', or {written(x)}' for x in self.also)
    return [' and '.join(parts) + or_also] if parts else []


def written(value: Any) -> str:
  """Formats a value as a user writes it: 2 for 2.0, text without quotes."""
  if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
    return str(int(value))
  return errors.short(value)


WHOLE = Range(int)
NATURAL = Range(int, 0, LARGEST)
POSITIVE = Range(int, 1, LARGEST)
# Sides, channels and other sizes of arrays.
SIZE = Range(int, 1, 2**16)
LAYERS = Range(int, 1, 1000)
ABOVE_0 = Range(float, 0, open_low=True)
SHARE = Range(float, 0, 1)  # both ends included
BELOW_1 = Range(float, 0, 1, open_high=True)
INSIDE = Range(float, 0, 1, open_low=True, open_high=True)
SEED = Range(int, 0, 2**32 - 1)
FLAG = Range(bool)
TEXT = Range(str)
ANY = range(1000)  # lengths of a tuple
TEXTS = Range(str, lengths=ANY, like="('one', 'two'): a tuple of strings")

KEYS = {
  'seed': SEED,
  'steps': POSITIVE,
  'batch_size': POSITIVE,
  'accumulate': POSITIVE,
  'data.name': TEXT,
  'data.tfds': TEXT,
  'data.path': TEXT,
  'data.split': TEXT,
  'data.points': TEXT,
  'data.image_size': SIZE._replace(
    lengths=(0, 2),
    alone=True,
    like='32, or (32, 48): sides in pixels, or () for points',
  ),
  'data.channels': SIZE,
  'data.captions': TEXT,
  'data.templates': TEXTS,
  'data.names': TEXTS,
  'data.flip': FLAG,
  'data.max_unreadable': NATURAL,
  'data.max_value': Range(int, 0, 65535),
  'model.name': TEXT,
  'model.predict': TEXT,
  'model.variance': TEXT,
  # The time embedding has channels / 2 frequencies and needs at least two.
  'model.channels': Range(int, 4, 2**16),
  'model.multipliers': Range(
    int,
    1,
    1024,
    lengths=range(1, 17),
    like='(1, 2, 2): 1 to 16 integers of 1 to 1024',
  ),
  'model.blocks': LAYERS,
  'model.attention': SIZE._replace(
    lengths=ANY, like='(16, 8): positive integers, or () for none'
  ),
  'model.groups': SIZE,
  'model.dropout': BELOW_1,
  'model.dtype': Range(str, choices=('float32', 'bfloat16')),
  'model.remat': FLAG,
  'model.patch': SIZE,
  'condition.name': TEXT,
  'condition.drop': BELOW_1,
  'condition.classes': Range(int, 0, 10**6),
  'condition.length': SIZE,
  'condition.width': SIZE,
  'condition.depth': LAYERS,
  'schedule.name': TEXT,
  'schedule.T': Range(int, 1, 10**6),
  'schedule.beta_1': INSIDE,
  'schedule.beta_T': INSIDE,
  'schedule.zero_terminal_snr': FLAG,
  'schedule.s': Range(float, 0, 1, open_high=True),
  'loss.name': TEXT,
  'loss.t': TEXT,
  'loss.gamma': ABOVE_0,
  'optimizer.learning_rate': ABOVE_0,
  'optimizer.warmup': NATURAL,
  'optimizer.decay': Range(str, choices=('', 'linear', 'cosine')),
  'optimizer.beta_1': BELOW_1,
  'optimizer.beta_2': BELOW_1,
  'optimizer.eps': ABOVE_0,
  'optimizer.clip': ABOVE_0,
  'optimizer.ema': BELOW_1,
  'sampler.name': TEXT,
  'sampler.steps': POSITIVE,
  'sampler.spacing': TEXT,
  'sampler.eta': SHARE,
  'sampler.variance': TEXT,
  'sampler.clip': FLAG,
  'sampler.guidance': Range(float, 0),
  'sampler.guidance_interval': SHARE._replace(
    lengths=(2,), like='(0, 1): (low, high) of t / T, both in 0..1'
  ),
  'sampler.guidance_rescale': SHARE,
  'sampler.batch_size': POSITIVE,
  'sampler.weights': Range(str, choices=('ema', 'raw')),
  'edit.jump': POSITIVE,
  'edit.resample': POSITIVE,
  'codec.steps': POSITIVE,
  'codec.log2_candidates': Range(int, 1, 24),
  'codec.group_bits': Range(float, 0, 24, open_low=True),
  'codec.batch_size': POSITIVE,
  'evaluate.split': TEXT,
  'evaluate.images': NATURAL,
  'evaluate.draws': NATURAL,
  'evaluate.batch_size': POSITIVE,
  'evaluate.weights': Range(str, choices=('', 'ema', 'raw')),
  'evaluate.resize': TEXT,
  'evaluate.neighbours': POSITIVE,
  'evaluate.cache': TEXT,
  'parallel.engine': Range(str, choices=('jit', 'pmap')),
  'parallel.data': POSITIVE._replace(also=(-1,)),
  'parallel.fsdp': POSITIVE,
  'parallel.spatial': POSITIVE,
  'checkpoint.every': POSITIVE,
  'checkpoint.keep': POSITIVE,
  'checkpoint.keep_every': NATURAL,
  'log.every': POSITIVE,
  'log.pictures_every': NATURAL,
  'log.pictures_steps': NATURAL,
  'log.wandb': TEXT,
}
FLAGS = {
  'bytes': NATURAL,
  'num_processes': POSITIVE,
  'num_samples': POSITIVE,
  'peer_timeout': POSITIVE,
  'process_id': NATURAL,
  'seed': SEED,
  'start_timeout': POSITIVE,
  'step': NATURAL,
  'stopped_code': Range(int, 0, 255),
  'strength': Range(float, 0, 1, open_low=True),
}


def check(flat: Mapping[str, Any]) -> None:
  """Refuses a recipe with a value of the wrong type or out of range.

  Args:
    flat: A flattened recipe, such as {'model.channels': 128, ...}. Keys that a
      user has added may have any value.

  Raises:
    UserError: With the first such key.
  """
  for key, value in flat.items():
    if key in KEYS:
      _check(f'config.{key}', value, KEYS[key])


def check_fields(
  fields: Mapping[str, Any], allowed: Mapping[str, Range]
) -> None:
  """Like `check`, for the fields of a file, which must be those of `allowed`.

  Raises:
    UserError: With the first field that is missing, unknown or not allowed.
  """
  for name in [*allowed, *fields]:
    if name not in fields:
      raise errors.UserError(f'the field {name} is missing')
    if name not in allowed:
      raise errors.UserError(f'the field {errors.short(name)} is not known')
    _check(name, fields[name], allowed[name])


def check_flags(flags: Mapping[str, Any]) -> None:
  """Like `check`, for the flags of the command line; None is a flag not set.

  Raises:
    UserError: With the first such flag.
  """
  for name, allowed in FLAGS.items():
    if flags.get(name) is not None:
      _check(f'--{name}', flags[name], allowed)


def _check(name: str, value: Any, allowed: Range) -> None:
  if allowed.holds(value):
    return
  if allowed.choices and isinstance(value, str):
    raise errors.unknown(name, value, allowed.choices)
  raise errors.UserError(
    f'{name}={written(value)} must be {allowed.describe(value)}'
  )
