"""The logs of a run: metrics.jsonl, TensorBoard, W&B, the progress bar."""

import contextlib
import contextvars
import functools
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import pathlib
import re
import secrets
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
from PIL import Image

from ddpm_jax import errors
from ddpm_jax import imagefile
from ddpm_jax import jsonfile
from ddpm_jax.parallel import processes
from ddpm_jax.storage import paths

T = TypeVar('T')
WANDB_INSTALL = "pip install -e '.[wandb]'"


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


def result(message: str) -> None:
  """Prints a line to stdout, if shown."""
  if is_shown():
    print(message)


def read(path: pathlib.Path) -> list[dict[str, float]]:
  """Returns the lines of a metrics.jsonl.

  Damaged lines are left out with a warning. A last line that a kill cut short
  is left out without one.
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
  """A place that shows scalars and images; this one drops them."""

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Adds numbers by name."""

  def pictures(self, step: int, files: dict[str, pathlib.Path]) -> None:
    """Adds PNG files by name. Files that do not exist are skipped."""

  def sync(self) -> None:
    """Returns when everything added is on disk, or in the bucket."""


class _Several(Board):
  def __init__(self, *boards: Board) -> None:
    self._boards = boards

  def scalars(self, step: int, values: dict[str, float]) -> None:
    for board in self._boards:
      board.scalars(step, values)

  def pictures(self, step: int, files: dict[str, pathlib.Path]) -> None:
    for board in self._boards:
      board.pictures(step, files)

  def sync(self) -> None:
    for board in self._boards:
      board.sync()


class _TensorBoard(Board):
  def __init__(self, events: Any, send: Callable[[], None]) -> None:
    self._events, self._send = events, send

  def scalars(self, step: int, values: dict[str, float]) -> None:
    for name, value in values.items():
      self._events.add_scalar(name, value, step)

  def pictures(self, step: int, files: dict[str, pathlib.Path]) -> None:
    for name, image in _opened(files):
      pixels = np.asarray(image)
      self._events.add_image(name, pixels, step, dataformats='HWC')

  def sync(self) -> None:
    self._events.flush()
    self._send()


class _Wandb(Board):
  """A run of W&B. Its first failure is a warning, and ends its logging."""

  def __init__(self, module: Any, run: Any) -> None:
    self._module, self._run = module, run

  def scalars(self, step: int, values: dict[str, float]) -> None:
    self._log(lambda: {'step': step, **values})

  def pictures(self, step: int, files: dict[str, pathlib.Path]) -> None:
    def images() -> dict[str, Any]:
      found = {
        name: self._module.Image(image) for name, image in _opened(files)
      }
      return {'step': step, **found}

    self._log(images)

  def _log(self, make: Callable[[], dict[str, Any]]) -> None:
    try:
      if self._run:
        self._run.log(make())
    except Exception as e:  # It must not end the training.
      self._run = None
      _warn_of_wandb(e)


def _opened(
  files: dict[str, pathlib.Path],
) -> Iterator[tuple[str, Image.Image]]:
  """The names and RGB images of those of the files that exist."""
  for name, path in files.items():
    if path.exists():
      with path.open('rb') as file, imagefile.opened(file) as image:
        yield name, image.convert('RGB')


@contextlib.contextmanager
def boards(
  workdir: pathlib.Path, start: int, *, project: str, config: dict[str, Any]
) -> Iterator[Board]:
  """Opens TensorBoard's log and, with a `project`, a run of W&B.

  Args:
    workdir: Folder of the run.
    start: Step that the run continues from.
    project: Project of W&B; '' for none.
    config: The recipe, for W&B.
  """
  with (
    tensorboard(workdir, start) as events,
    wandb(workdir, start, project, config) as run,
  ):
    yield _Several(events, run)


@contextlib.contextmanager
def tensorboard(workdir: pathlib.Path, start: int) -> Iterator[Board]:
  """Opens TensorBoard's log of a run, and removes events after step `start`.

  The first process writes it, and only where tensorboardX is installed
  (`pip install -e '.[tensorboard]'`).
  """
  if not (processes.is_primary() and importlib.util.find_spec('tensorboardX')):
    yield Board()
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
    send = functools.partial(paths.send, folder, workdir / 'tensorboard')
    yield _TensorBoard(events, send)


@contextlib.contextmanager
def wandb(
  workdir: pathlib.Path, start: int, project: str, config: dict[str, Any]
) -> Iterator[Board]:
  """Opens the run's run of W&B, and ends it.

  Only the first process logs. `wandb.json` in the workdir keeps the id, so that
  a resumed run continues the same run of W&B. Steps between the checkpoint and
  a kill are logged twice, with the same values; the x-axis is our `step`. W&B
  reads its own variables, such as WANDB_MODE=offline.

  A failure is a warning: training continues without W&B.
  """
  run = None
  if project and processes.is_primary():
    try:
      module = errors.optional('wandb', what='W&B', install=WANDB_INSTALL)
      run = _start_wandb(module, workdir, start, project, config)
    except Exception as e:  # No network, no login, no room, ...
      _warn_of_wandb(e)
  if run is None:
    yield Board()
    return
  code = 1
  try:
    yield _Wandb(module, run)
    code = 0
  finally:
    try:
      run.finish(exit_code=code)
    except Exception as e:
      _warn_of_wandb(e)


def _start_wandb(
  module: Any,
  workdir: pathlib.Path,
  start: int,
  project: str,
  config: dict[str, Any],
) -> Any:
  file = workdir / 'wandb.json'
  saved = _wandb_id(file) if start else None
  run_id = saved or secrets.token_hex(4)
  run = module.init(
    project=project,
    id=run_id,
    name=workdir.name,
    resume='allow' if saved else None,
    config=config,
    allow_val_change=True,  # of the recipe, when the run is resumed
    dir=None if paths.is_remote(workdir) else str(workdir),
    settings=module.Settings(
      silent=True,
      console='off',
      reinit='create_new',  # A notebook may have a run of its own.
      init_timeout=30,  # seconds
      finish_timeout=60,
    ),
  )
  run.define_metric('*', step_metric='step')
  with paths.atomic_write(file) as part:
    part.write_text(json.dumps({'id': run_id, 'project': project}) + '\n')
  if run.offline:
    where = pathlib.Path(run.dir).parent
    say(f'W&B                  offline; to upload: wandb sync {where}')
  elif run.url:
    say(f'W&B                  {run.url}')
  return run


def _wandb_id(file: pathlib.Path) -> str | None:
  """Returns the id in a wandb.json; None if there is none that can be used."""
  try:
    found = jsonfile.read(file) if file.exists() else {}
  except errors.UserError as e:
    logging.warning('%s; a new run of W&B is started', e)
    return None
  name = found.get('id') if isinstance(found, dict) else None
  return name if re.fullmatch(r'\w{1,64}', str(name)) and name else None


def _warn_of_wandb(error: Exception) -> None:
  reason = errors.short(str(error), 200)
  logging.warning(
    'W&B failed (%s: %s): the run continues without it; WANDB_MODE=offline '
    'needs no network',
    *(type(error).__name__, reason),
  )


class Metrics:
  """Writes metrics to metrics.jsonl and to a board."""

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
    self._before = seconds  # of training, up to `start`
    # The clock starts at the end of the first step of this process.
    self._last = start + 1, 0.0

  def write(self, step: int, values: dict[str, float], seconds: float) -> None:
    """Writes a line, with the images per second since the last line.

    Args:
      step: Step of the run.
      values: Metrics by name.
      seconds: Training time since the end of this process's first step. The
        time of earlier processes is added.
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
    """Returns when everything written is on disk, or in the bucket."""
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
  """Opens metrics.jsonl to append to it, for a run that continues from `start`.

  Lines of later steps, which a killed run has left, are removed. So the log of
  an interrupted run equals that of an uninterrupted one, except for the times.
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
      # Logs of older versions lack it.
      seconds=_number(kept[-1].get('seconds')) if kept else 0.0,
      batch_size=batch_size,
    )


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


def curve(workdir: pathlib.Path, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the steps and the values of one metric.

  Lines without it, from older versions, are skipped.
  """
  lines = [
    x for x in read(workdir / 'metrics.jsonl') if _is_number(x.get(name))
  ]
  return (
    np.array([line['step'] for line in lines]),
    np.array([line[name] for line in lines]),
  )
