"""What a run says of itself: metrics.jsonl, TensorBoard, the progress bar."""

import contextlib
import contextvars
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any
from typing import TextIO
from typing import TypeVar

import jax
import numpy as np
import tqdm

from ddpm_jax import errors
from ddpm_jax import imagefile
from ddpm_jax import jsonfile
from ddpm_jax.parallel import processes
from ddpm_jax.storage import paths

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


def _is_shown() -> bool:
  """Whether this process prints: the first of several, if not hidden."""
  return processes.is_primary() and _shown.get()


def say(message: str) -> None:
  """Prints a line to stderr, above the progress bar, if shown."""
  if _is_shown():
    tqdm.tqdm.write(message, file=sys.stderr)


def result(message: str) -> None:
  """Prints a line to stdout, if shown."""
  if _is_shown():
    print(message)


def read(path: pathlib.Path) -> list[dict[str, float]]:
  """The lines of a metrics.jsonl.

  One that a kill cut short, or that is damaged, is left out; damage is said.
  """
  if not path.exists():
    return []
  found, wrong = [], []
  for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
    try:
      values = jsonfile.parse(line)
      whole = isinstance(values, dict) and type(values['step']) is int
    except (ValueError, KeyError):
      whole = False
    if whole:
      found.append(values)
    elif line.endswith(b'\n'):
      wrong.append(number)
  if wrong:
    logging.warning(
      '%s: %d line(s) are damaged and left out, the first is line %d',
      *(path, len(wrong), wrong[0]),
    )
  return found


class Board:
  """TensorBoard's event files; nothing where tensorboardX is not installed."""

  def __init__(
    self, events: Any, send: Callable[[], None] = lambda: None
  ) -> None:
    self._events, self._send = events, send

  def scalars(self, step: int, values: dict[str, float]) -> None:
    for name, value in values.items():
      if self._events:
        self._events.add_scalar(name, value, step)

  def sync(self) -> None:
    """Returns when what was added is on disk, or in the bucket."""
    if self._events:
      self._events.flush()
      self._send()

  def pictures(self, step: int, files: dict[str, pathlib.Path]) -> None:
    """Adds PNG files by name. Those that are not there are passed over."""
    for name, path in files.items():
      if self._events and path.exists():
        with path.open('rb') as file, imagefile.opened(file) as image:
          pixels = np.asarray(image.convert('RGB'))
        self._events.add_image(name, pixels, step, dataformats='HWC')


@contextlib.contextmanager
def tensorboard(workdir: pathlib.Path, start: int) -> Iterator[Board]:
  """For a run that goes on after step `start`: later events are taken out.

  Written where tensorboardX is installed (`pip install -e '.[tensorboard]'`),
  by the first of several processes.
  """
  if not (processes.is_primary() and importlib.util.find_spec('tensorboardX')):
    yield Board(None)
    return
  tensorboardX = errors.optional(
    'tensorboardX',
    what='the log for TensorBoard',
    install="pip install -e '.[tensorboard]'",
  )
  with (
    paths.mirrored(workdir / 'tensorboard') as folder,
    tensorboardX.SummaryWriter(str(folder), purge_step=start + 1) as events,
  ):
    yield Board(events, lambda: paths.send(folder, workdir / 'tensorboard'))


class Metrics:
  """The lines of metrics.jsonl, and the same as TensorBoard's scalars."""

  def __init__(
    self,
    file: TextIO,
    board: Board,
    *,
    start: int,
    seconds: float,
    batch_size: int,
  ) -> None:
    self._file, self._board, self._batch_size = file, board, batch_size
    self._before = seconds  # of training, until `start`
    # The clock of a run that (re)starts begins at the end of its first step.
    self._last = start + 1, 0.0

  def write(self, step: int, values: dict[str, float], seconds: float) -> None:
    """Writes a line, with images a second since the last one.

    Args:
      step: of the run.
      values: to write.
      seconds: since the end of the first step that this program has made. What
        the run has trained before is added.
    """
    last_step, last_seconds = self._last
    self._last = step, seconds
    line = dict(values)
    if step > last_step and seconds > last_seconds:
      rate = self._batch_size * (step - last_step) / (seconds - last_seconds)
      line['images_per_second'] = float(f'{rate:.4g}')
    line['seconds'] = round(self._before + seconds, 3)
    self._file.write(json.dumps({'step': step, **line}) + '\n')
    self._board.scalars(step, line)

  def sync(self) -> None:
    """Returns when what was written is on disk, or in the bucket."""
    self._file.flush()
    self._board.sync()


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
  return value if _is_number(value) else 0.0


@contextlib.contextmanager
def metrics(
  workdir: pathlib.Path, board: Board, start: int, batch_size: int
) -> Iterator[Metrics]:
  """Appends to metrics.jsonl, for a run that goes on after step `start`.

  Lines of later steps, left by a run that was killed, are taken out: the log of
  an interrupted run is that of one that was not, but for the times.
  """
  path = workdir / 'metrics.jsonl'
  if not processes.is_primary():
    path = pathlib.Path(os.devnull)
  kept = [line for line in read(path) if line['step'] <= start]
  if processes.is_primary():
    with paths.atomic_write(path) as part:
      part.write_text(''.join(json.dumps(line) + '\n' for line in kept))
  with paths.append(path) as file:
    yield Metrics(
      file,
      board,
      start=start,
      # A log of an older version does not have them.
      seconds=_number(kept[-1].get('seconds')) if kept else 0.0,
      batch_size=batch_size,
    )


# Seconds that this program has spent on compiling.
_compiling = 0.0


def compiling(what: str, fn: Callable[..., T]) -> Callable[..., T]:
  """Says that the first call of a jitted `fn` compiles, and how long it took.

  The computation itself is not waited for.
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
  """Makes whole lines of what tqdm writes over one another in a terminal."""

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
  """A bar on stderr: how far a loop is, how fast, how long it will take.

  It appears, and its clock starts, at the end of the first update. The first
  round compiles, and says nothing of those that follow. A loop that is done
  after one round has a line instead. In a terminal the bar moves; a file gets
  whole lines, one in 10 seconds at most.
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
    """Goes on by `n`, and shows which batch this was, or what is given."""
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
    """Since the first update, without pauses."""
    return self._bar.format_dict['elapsed'] if self._bar else 0.0

  @property
  def rate(self) -> float | None:
    """Of the unit a second, of late; None if it is not known yet."""
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
    disable=not _is_shown(),
    file=sys.stderr if terminal else _Lines(sys.stderr),
    dynamic_ncols=True,
    leave=None,  # but for one inside of another
    bar_format='{desc}: {percentage:3.0f}%' + bar + ' {n}/{total} {unit} '
    '[{elapsed} < {remaining}{postfix}]',
    **({} if terminal else lines),
  )


def watched(batches: Iterable[T], name: str, total: int) -> Iterator[T]:
  """Batches of arrays with a row an image, and a bar of `total` images."""
  with Progress(name, total) as bar:
    for batch in batches:
      bar.update(len(jax.tree.leaves(batch)[0]))
      yield batch


def advance(bar: Progress, loss: float, images: int) -> None:
  """One step further: shows the loss, and the images a second of late."""
  rate = {'images/s': f'{bar.rate * images:.0f}'} if bar.rate else {}
  bar.update(**{'loss': f'{loss:.4f}', **rate})


def curve(workdir: pathlib.Path, name: str) -> tuple[np.ndarray, np.ndarray]:
  """The steps, and the values of one metric at them.

  Lines without it, as an older version wrote them, are passed over.
  """
  lines = [
    x for x in read(workdir / 'metrics.jsonl') if _is_number(x.get(name))
  ]
  return (
    np.array([line['step'] for line in lines]),
    np.array([line[name] for line in lines]),
  )
