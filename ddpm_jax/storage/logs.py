"""What a person sees: messages, and the progress bar."""

import contextlib
import contextvars
import io
import itertools
import logging
import math
import sys
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any
from typing import TextIO
from typing import TypeVar

import jax
import tqdm

from ddpm_jax.parallel import processes

T = TypeVar('T')


_shown: contextvars.ContextVar[bool] = contextvars.ContextVar(
  'shown', default=True
)


@contextlib.contextmanager
def shown(progress: bool) -> Iterator[None]:
  """Shows or hides messages and progress bars, as a Python caller wants."""
  token = _shown.set(progress)
  try:
    yield
  finally:
    _shown.reset(token)


def is_shown() -> bool:
  """Whether this process prints: the first of several, if not hidden."""
  return processes.is_primary() and _shown.get()


def say(message: str) -> None:
  """Prints a line to stderr, above the progress bar, if shown."""
  if is_shown():
    tqdm.tqdm.write(message, file=sys.stderr)


def warn(message: str) -> None:
  """Prints a warning like `say`; if that is hidden, by `logging`."""
  if is_shown():
    say(f'warning: {message}')
  elif processes.is_primary():
    logging.getLogger(__name__).warning('%s', message)


def result(message: str) -> None:
  """Prints a line to stdout, if shown."""
  if is_shown():
    print(message)


# Seconds that this process has spent on compiling.
_compiling = 0.0


def compiling(what: str, fn: Callable[..., T]) -> Callable[..., T]:
  """Returns `fn`, whose first call prints that it compiles and for how long.

  Args:
    what: Name of the function in the messages.
    fn: A jitted function. Its result is not waited for.
  """

  def first(*args: Any) -> T:
    global _compiling
    say(f'compiling {what}')
    begun = time.time()
    result = fn(*args)
    seconds = time.time() - begun
    _compiling += seconds
    say(f'compiled {what} in {seconds:.1f} s')
    return result

  calls = itertools.chain([first], itertools.repeat(fn))
  return lambda *args: next(calls)(*args)


class _Lines(io.TextIOBase):
  """Writes tqdm's updates as lines, for a file that is not a terminal."""

  def __init__(self, file: TextIO) -> None:
    self._file, self._last = file, ''

  def write(self, text: str) -> int:
    line = text.strip()
    if line and line != self._last:
      self._file.write(line + '\n')
      self._file.flush()
      self._last = line
    return len(text)


class Progress:
  """A progress bar on stderr, with the rate and the time left.

  The bar appears and its clock starts at the first update, since the first
  round includes compilation. A loop of one round gets one line instead. A file
  gets lines, at most one every 10 seconds.
  """

  def __init__(
    self, name: str, total: int, unit: str = 'images', *, initial: int = 0
  ) -> None:
    self._name, self._total, self._unit = name, total, unit
    self._initial, self._round, self._size = initial, 0, 1
    self._bar: tqdm.tqdm | None = None
    self._begun = time.time() - _compiling
    self._updated = 0.0  # seconds, at the last update

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *error: object) -> None:
    if self._bar:
      self._bar.close()

  def update(self, n: int = 1, /, **shown: str) -> None:
    """Advances by `n`, and shows `shown`, or else the number of the batch."""
    self._round += 1
    if self._round == 1:
      self._size = n
    if not shown and self._size > 1:
      rounds = math.ceil((self._total - self._initial) / self._size)
      shown = {'batch': f'{self._round} of {rounds}'}
    if self._bar:
      self._bar.set_postfix(shown, refresh=False)
      self._bar.update(n)
      self._updated = self.seconds
    elif self._initial + n < self._total:
      self._bar = _bar(
        self._name, self._total, self._unit, self._initial + n, shown
      )
    else:
      seconds = time.time() - _compiling - self._begun
      say(f'{self._name}: {n} {self._unit} in {seconds:.1f} s')

  @property
  def seconds(self) -> float:
    """Seconds since the first update, without pauses."""
    return self._bar.format_dict['elapsed'] if self._bar else 0.0

  @property
  def rate(self) -> float | None:
    """Recent units per second; None if not known yet."""
    if not self._bar:
      return None
    found = self._bar.format_dict
    if found['rate'] or not self._updated:
      return found['rate']
    return (found['n'] - found['initial']) / self._updated

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Stops the clock."""
    begun = time.time()
    yield
    if self._bar and not self._bar.disable:
      self._bar.start_t += time.time() - begun
      self._bar.last_print_t += time.time() - begun


def _bar(
  name: str, total: int, unit: str, initial: int, shown: dict[str, str]
) -> tqdm.tqdm:
  terminal = sys.stderr.isatty()
  bar = '|{bar}|' if terminal else ''
  lines = {'mininterval': 10, 'miniters': 1, 'position': 0}
  return tqdm.tqdm(
    desc=name,
    total=total,
    initial=initial,
    unit=unit,
    postfix=shown,
    disable=not is_shown(),
    file=sys.stderr if terminal else _Lines(sys.stderr),
    dynamic_ncols=True,
    leave=None,  # keep it, unless it is inside another bar
    bar_format='{desc}: {percentage:3.0f}%' + bar + ' {n}/{total} {unit} '
    '[{elapsed} < {remaining}{postfix}]',
    **({} if terminal else lines),
  )


def watched(batches: Iterable[T], name: str, total: int) -> Iterator[T]:
  """Yields the batches, with a progress bar of `total` images (rows)."""
  with Progress(name, total) as bar:
    for batch in batches:
      bar.update(len(jax.tree.leaves(batch)[0]))
      yield batch


def advance(bar: Progress, loss: float, images: int) -> None:
  """Advances by one step, and shows the loss and recent images per second."""
  rate = {'images/s': f'{bar.rate * images:.0f}'} if bar.rate else {}
  bar.update(**{'loss': f'{loss:.4f}', **rate})
