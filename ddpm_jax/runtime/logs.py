"""What a run says of itself: metrics.jsonl, TensorBoard, the progress bar."""

import contextlib
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Callable
from collections.abc import Iterator

import numpy as np
import tqdm

from ddpm_jax import errors
from ddpm_jax.runtime import processes


def say(message: str) -> None:
  """A line for the person who watches: to stderr, above the progress bar.

  Of several processes, the first one speaks, writes, and shows a bar.
  """
  if processes.leads():
    tqdm.tqdm.write(message, file=sys.stderr)


def read(path: pathlib.Path) -> list[dict[str, float]]:
  """The lines of a metrics.jsonl, without a last one that a kill cut short."""
  if not path.exists():
    return []
  lines = path.read_text().splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith('\n')]


@contextlib.contextmanager
def writer(workdir: pathlib.Path, start: int) -> Iterator[Callable]:
  """Gives write(step, values), for a run that goes on after step `start`.

  Lines of later steps, left by a run that was killed, are taken out: the log of
  an interrupted run is that of one that was not. TensorBoard events are written
  where tensorboardX is installed (`pip install -e '.[tensorboard]'`).
  """
  if not processes.leads():
    yield lambda step, values: None
    return
  path = workdir / 'metrics.jsonl'
  kept = [line for line in read(path) if line['step'] <= start]
  part = path.with_name('.metrics.jsonl.part')
  part.write_text(''.join(json.dumps(line) + '\n' for line in kept))
  os.replace(part, path)
  with (
    path.open('a', buffering=1) as file,
    _tensorboard(workdir, start) as board,
  ):

    def write(step: int, values: dict[str, float]) -> None:
      file.write(json.dumps({'step': step, **values}) + '\n')
      for name, value in values.items():
        board.add_scalar(name, value, step)

    yield write


@contextlib.contextmanager
def _tensorboard(workdir: pathlib.Path, start: int) -> Iterator:
  if not importlib.util.find_spec('tensorboardX'):
    yield _Silent()
    return
  tensorboardX = errors.optional(
    'tensorboardX',
    what='the log for TensorBoard',
    install="pip install -e '.[tensorboard]'",
  )
  folder = str(workdir / 'tensorboard')
  with tensorboardX.SummaryWriter(folder, purge_step=start + 1) as board:
    yield board


class _Silent:
  """In TensorBoard's place where it is not installed."""

  def add_scalar(self, name: str, value: float, step: int) -> None:
    pass


def progress(total: int, initial: int, unit: str) -> tqdm.tqdm:
  """A bar on stderr: how far, how fast, how long yet."""
  return tqdm.tqdm(
    total=total,
    initial=initial,
    unit=unit,
    disable=not processes.leads(),
    file=sys.stderr,
    dynamic_ncols=True,
    # A log file wants a line now and then, not ten a second.
    mininterval=0.2 if sys.stderr.isatty() else 10,
    bar_format='{percentage:3.0f}%|{bar}| {n}/{total} {unit} '
    '[{elapsed} < {remaining}{postfix}]',
  )


def advance(bar: tqdm.tqdm, loss: float, images: int) -> None:
  """One step further: shows the loss, and the images a second of late."""
  rate = bar.format_dict['rate']
  bar.set_postfix(
    {'loss': f'{loss:.4f}', 'images/s': f'{(rate or 0) * images:.0f}'},
    refresh=False,
  )
  bar.update()


def curve(workdir: pathlib.Path, name: str) -> tuple[np.ndarray, np.ndarray]:
  """The steps, and the values of one metric at them."""
  lines = read(workdir / 'metrics.jsonl')
  return (
    np.array([line['step'] for line in lines]),
    np.array([line[name] for line in lines]),
  )
