"""metrics.jsonl: the numbers of a training run."""

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any
from typing import TextIO

import numpy as np

from ddpm_jax import jsonfile
from ddpm_jax.parallel import processes
from ddpm_jax.storage import boards
from ddpm_jax.storage import paths


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


class Metrics:
  """Writes metrics to metrics.jsonl and to a board."""

  def __init__(
    self,
    file: TextIO,
    board: boards.Board,
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
def opened(
  workdir: pathlib.Path, board: boards.Board, start: int, batch_size: int
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
