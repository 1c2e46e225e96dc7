"""TensorBoard and Weights & Biases: numbers and images of a training run."""

import contextlib
import functools
import importlib.util
import json
import logging
import pathlib
import re
import secrets
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from ddpm_jax import errors
from ddpm_jax import imagefile
from ddpm_jax import jsonfile
from ddpm_jax.parallel import processes
from ddpm_jax.storage import logs
from ddpm_jax.storage import paths

WANDB_INSTALL = "pip install -e '.[wandb]'"


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
    for name, image in _images(files):
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
        name: self._module.Image(image) for name, image in _images(files)
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


def _images(
  files: dict[str, pathlib.Path],
) -> Iterator[tuple[str, Image.Image]]:
  """The names and RGB images of those of the files that exist."""
  for name, path in files.items():
    if path.exists():
      with path.open('rb') as file, imagefile.opened(file) as image:
        yield name, image.convert('RGB')


@contextlib.contextmanager
def opened(
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
    logs.say(f'W&B                  offline; to upload: wandb sync {where}')
  elif run.url:
    logs.say(f'W&B                  {run.url}')
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
