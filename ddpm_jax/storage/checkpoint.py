"""Saving a run, and finding its newest whole checkpoint again (with Orbax).

A checkpoint is `state`, `ema`, and `about`: JSON with the caller's `data` and
`config`, the type and a fingerprint of every array, and its own CRC. The
fingerprints are there because neither Orbax nor its storage notices flipped
bits in array data: nearly all of them load in silence.
"""

import contextlib
import gc
import logging
import os
import re
import sys
import time
import warnings
import weakref
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from ddpm_jax import errors
from ddpm_jax.parallel import processes
from ddpm_jax.storage import fingerprint

# What is missing from a checkpoint, or stands in the place of something else.
_ABSENT = FileNotFoundError, NotADirectoryError, IsADirectoryError
_STORAGE = re.compile(
  'PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|'
  'RESOURCE_EXHAUSTED|CANCELLED|OS error code: '
)
_CONTENT = re.compile('NOT_FOUND|OS error code: (2|20|21):')
_UNTOUCHED = 'those already there are as they were'

Path = str | os.PathLike[str]


# The save that each writer has begun, until it is waited for: only its result
# ends the thread, and closes the files, that Orbax opens for a save.
_under_way: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class Restored(NamedTuple):
  step: int
  state: Any
  ema: Any
  data: Any
  config: Any


def open(
  path: Path, *, keep: int = 2, keep_every: int = 0
) -> ocp.training.Checkpointer:
  """A writer of checkpoints in the folder `path`, which is made if need be.

  The newest `keep` stay, and for good every multiple of `keep_every` (0:
  none). What interrupted saves have left behind is removed.

  Raises:
    UserError: `keep` < 1, or `path` is not a folder that one can write to.
  """
  if keep < 1:
    raise errors.UserError(f'keep = {keep}: at least 1 must be kept')
  path = _absolute(path)
  policies = ocp.training.preservation_policies
  kept = [policies.LatestN(keep)]
  if keep_every:
    kept.append(policies.EveryNSteps(keep_every))
  with _saving(path):
    return ocp.training.Checkpointer(
      path,
      context=_context(),
      preservation_policy=policies.AnyPreservationPolicy(kept),
      cleanup_tmp_directories=True,
    )


def save(
  checkpointer: ocp.training.Checkpointer,
  step: int,
  *,
  state: Any,
  ema: Any,
  data: Any,
  config: Any,
) -> None:
  """Saves in the background; the arrays may be donated once this returns.

  `state` and `ema` are pytrees of arrays, `data` and `config` are JSON (so
  tuples come back as lists). Does nothing for a step that is saved already.

  Raises:
    UserError: this save, or the one before it, failed.
  """
  wait(checkpointer)
  if step in [saved.step for saved in checkpointer.checkpoints]:
    return
  items = {'ema': ema, 'state': state}
  about = {
    'step': step,
    'data': data,
    'config': config,
    'arrays': fingerprint.describe(items),
  }
  items['about'] = {**about, 'crc32': fingerprint.crc32(about)}
  with _saving(checkpointer.directory, checkpointer):
    # Forced, or Orbax skips what its own policy thinks too early.
    _under_way[checkpointer] = checkpointer.save_checkpointables_async(
      step, items, force=True
    )


def trained(state: Any) -> dict[str, Any]:
  """What a checkpoint holds of a training state beside the EMA weights."""
  kept = {
    'step': state.step,
    'params': state.params,
    'opt_state': state.opt_state,
  }
  return kept if state.history is None else kept | {'history': state.history}


def wait(checkpointer: ocp.training.Checkpointer) -> None:
  """Returns when all is on disk. Raises UserError if saving failed."""
  with _saving(checkpointer.directory, checkpointer):
    try:
      checkpointer.wait()
    finally:
      if save := _under_way.pop(checkpointer, None):
        save.result()


def close(checkpointer: ocp.training.Checkpointer) -> None:
  """Waits, then frees. Raises UserError if saving failed."""
  try:
    with processes.one_fails_all():  # else closing waits for the others
      wait(checkpointer)
  finally:
    checkpointer.close()


def steps(path: Path) -> list[int]:
  """The finished checkpoints, oldest first; none if there is no such folder.

  Raises:
    UserError: `path` is a file, or cannot be read.
  """
  names = ocp.path.step.standard_name_format()
  try:
    return sorted(saved.step for saved in names.find_all(_absolute(path)))
  except OSError as e:
    raise errors.UserError(f'cannot read {path} ({_line(e)})') from None


def restore(
  source: ocp.training.Checkpointer | Path,
  abstract_state: Any,
  abstract_ema: Any,
) -> Restored | None:
  """The newest whole checkpoint, or None if there is none at all.

  The abstract trees are `jax.ShapeDtypeStruct`s with the shardings wanted
  now, whatever they were when saved. Damaged checkpoints are warned of and
  passed over. Given a checkpointer, they are also renamed once an older one
  has loaded, as the run will come to save those steps again.

  Raises:
    UserError: all are damaged, or the newest whole one is of another model.
  """
  writer = source if isinstance(source, ocp.training.Checkpointer) else None
  path = writer.directory if writer else source
  known = steps(path)
  if not known:
    return None
  abstract = {'ema': abstract_ema, 'state': abstract_state}
  step, items = _newest_whole(path, known, abstract)
  if writer:
    _set_aside(writer, [later for later in known if later > step])
  about = items.pop('about')
  return Restored(step, **items, data=about['data'], config=about['config'])


def restore_item(
  path: Path, item: str, abstract: Any, step: int | None = None
) -> tuple[int, Any]:
  """(step, `ema` or `state`) of the newest whole checkpoint, or at `step`.

  Raises:
    UserError: there is none, it is damaged, or it is of another model.
    RunError: it holds numbers that are not finite.
  """
  known = steps(path)
  if not known or step not in (None, *known):
    wanted = 'checkpoint' if step is None else f'checkpoint {step}'
    has = ', '.join(map(str, known)) or 'none'
    raise errors.UserError(f'no {wanted} in {path}; it has: {has}')
  known = known if step is None else [step]
  step, items = _newest_whole(path, known, {item: abstract})
  if name := fingerprint.first_not_finite(items[item]):
    raise errors.RunError(
      f'checkpoint {step} in {path} holds numbers that are not finite, in '
      f'{item}/{name}; it has: {", ".join(map(str, steps(path)))}'
    )
  return step, items[item]


def newest_config(path: Path) -> Any:
  """The `config` of the newest checkpoint that has one; None if none has.

  The arrays are not looked at. For one process, whatever the others do.

  Raises:
    UserError: a file cannot be read, whatever it holds.
  """
  for step in reversed(steps(path)):
    folder = os.path.join(_absolute(path), str(step))
    with _hushed():
      try:
        return _about(folder)['config']
      except Exception as error:
        if _unreadable(error):
          raise _cannot_read(folder, _line(error)) from error
  return None


def _newest_whole(
  path: Path, known: list[int], abstract: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
  for step in reversed(known):
    folder = os.path.join(_absolute(path), str(step))
    items, wrong = _try(folder, abstract)
    if not wrong:
      return step, items
    logging.warning('checkpoint %s is damaged, not used: %s', folder, wrong)
  names = ', '.join(map(str, known))
  raise errors.UserError(f'no whole checkpoint in {path}; damaged: {names}')


def _try(folder: str, abstract: dict[str, Any]) -> tuple[dict[str, Any], str]:
  """The items of a whole checkpoint and '', or {} and what is wrong with it.

  Raises:
    UserError: it cannot be read, whatever it holds.
  """
  items, wrong, unreadable = {}, '', False
  # The fault of the caller or of the device, not of the checkpoint.
  others = errors.UserError, jax.errors.JaxRuntimeError, MemoryError
  with _hushed():
    try:
      items = _load(folder, abstract)
    except Exception as error:
      if isinstance(_root(error), others):
        raise
      wrong, unreadable = _line(error), _unreadable(error)
      if closed := None if unreadable else _closed_folder(folder):
        # Orbax takes what is in there to be absent.
        wrong, unreadable = _line(closed), True
    if wrong:
      # Let the reads in flight end while no one hears them.
      gc.collect()
      time.sleep(0.5)
      gc.collect()
  if unreadable:
    raise _cannot_read(folder, wrong)
  # Each process reads its own part, but all must go on with the same step.
  if not np.all(multihost_utils.process_allgather(np.array(not wrong))):
    return {}, wrong or 'another process could not read it'
  saved = items['about']['arrays']
  now = fingerprint.describe({item: items[item] for item in abstract})
  changed = [name for name in now if now[name] != saved[name]]
  return items, f'the bytes of {changed[0]} have changed' if changed else ''


def _cannot_read(folder: str, wrong: str) -> errors.UserError:
  return errors.UserError(
    f'cannot read checkpoint {folder} ({wrong}): nothing is changed; mend '
    'that, and try again'
  )


def _unreadable(error: BaseException) -> bool:
  """Whether the storage failed, which says nothing of what it holds."""
  seen: BaseException | None = error
  while seen:
    if isinstance(seen, OSError) and not isinstance(seen, _ABSENT):
      # Those that Python itself raises for the content have no number.
      return seen.errno is not None
    # TensorStore raises a ValueError with a code of Abseil and, of a file
    # system, that of the system.
    if _STORAGE.search(str(seen)) and not _CONTENT.search(str(seen)):
      return True
    seen = seen.__cause__ or seen.__context__
  return False


def _closed_folder(folder: str) -> OSError | None:
  """Why a folder in the checkpoint cannot be listed; None if all can."""
  failed: list[OSError] = []
  for _ in os.walk(folder, onerror=failed.append):
    pass
  return next((e for e in failed if not isinstance(e, _ABSENT)), None)


def _load(folder: str, abstract: dict[str, Any]) -> dict[str, Any]:
  """The items of `abstract`, and `about`; raises anything if damaged."""
  about = _about(folder)
  with _context(alone=True):
    _check_model(folder, about['arrays'], abstract)
    return {**ocp.load_checkpointables(folder, abstract), 'about': about}


def _about(folder: str) -> dict[str, Any]:
  """Raises anything if it is damaged."""
  with _context(alone=True):
    about = ocp.load_checkpointables(folder, {'about': None})['about']
  if about.pop('crc32') != fingerprint.crc32(about):
    raise ValueError('the bytes of about have changed')
  # Those of earlier versions do not say.
  step = about.get('step')
  if step is not None and str(step) != os.path.basename(folder):
    raise ValueError(f'it is of step {step}, under another name')
  return about


def _check_model(
  folder: str, saved: dict[str, Any], abstract: dict[str, Any]
) -> None:
  # Orbax casts dtypes in silence; a wrong shape is an obscure error there.
  here = {
    name: fingerprint.type_name(x) for name, x in fingerprint.named(abstract)
  }
  there = {
    name: type_
    for name, (type_, _) in saved.items()
    if name.split('/')[0] in abstract
  }
  for name in here | there:
    if here.get(name) != there.get(name):
      raise errors.UserError(
        f'{folder} is of another model: {name} is '
        f'{there.get(name, "absent")} there, {here.get(name, "absent")} here'
      )


def _set_aside(
  checkpointer: ocp.training.Checkpointer, damaged: list[int]
) -> None:
  if jax.process_index() == 0:
    for step in damaged:
      folder = checkpointer.directory / str(step)
      folder.rename(f'{folder}.damaged-{time.time_ns()}')
  multihost_utils.sync_global_devices('ddpm_jax: damaged checkpoints renamed')
  checkpointer.reload()


def _context(*, alone: bool = False) -> ocp.Context:
  """Orbax's settings; `alone`: without waiting for the other processes."""
  logging.getLogger('absl').addFilter(_worth_reading)
  context = ocp.Context()
  registry = ocp.handlers.local_registry()
  # By default a dict of numbers would be saved as arrays, one by one.
  registry.add(ocp.handlers.JsonHandler, checkpointable_name='about')
  context.checkpointables.registry = registry
  context.array.saving.use_compression = False  # 7% smaller, 40% slower.
  # In the background, one that cannot be made is noticed five minutes late.
  context.asynchronous.create_directories_asynchronously = False
  if alone:
    # Else those that could read wait 20 minutes for the one that could not.
    me = jax.process_index()
    context.multiprocessing.primary_host = me
    context.multiprocessing.active_processes = {me}
    context.multiprocessing.barrier_sync_key_prefix = f'process_{me}'
  return context


def _worth_reading(record: logging.LogRecord) -> bool:
  # Orbax tells INFO by the page, warns of any save that takes over a second,
  # and logs a dozen times each error that it raises anyway. What others log
  # through absl stays.
  if os.path.join('orbax', 'checkpoint') not in record.pathname:
    return True
  error = record.exc_info[1] if record.exc_info else None
  if isinstance(error, Exception) and record.threadName == 'async_save':
    # Raised only after the others were waited for, for up to 20 minutes.
    message = f'cannot save a checkpoint ({_line(error)}); {_UNTOUCHED}'
    processes.end_all(errors.UserError(message))
  return False


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
  """When a read fails, Orbax abandons the others, and Python prints pages."""
  hooks = sys.unraisablehook, sys.excepthook
  asyncio = logging.getLogger('asyncio')
  try:
    sys.unraisablehook = lambda _: None
    sys.excepthook = lambda *_: None
    asyncio.disabled = True
    with warnings.catch_warnings(action='ignore'):
      yield
  finally:
    sys.unraisablehook, sys.excepthook = hooks
    asyncio.disabled = False


@contextlib.contextmanager
def _saving(
  path: Any, checkpointer: ocp.training.Checkpointer | None = None
) -> Iterator[None]:
  try:
    yield
  except Exception as error:
    if checkpointer:
      checkpointer.reload()  # Else it counts the failed step as saved.
    raise errors.UserError(
      f'cannot save checkpoints in {path} ({_line(error)}); {_UNTOUCHED}'
    ) from error


def _root(error: BaseException) -> BaseException:
  while inner := error.__cause__ or error.__context__:
    error = inner
  return error


def _line(error: Exception) -> str:
  root = _root(error)
  return f'{type(root).__name__}: {str(root).strip().partition(chr(10))[0]}'


def _absolute(path: Path) -> str:
  path = os.fspath(path)
  path = path if '://' in path else os.path.abspath(path)
  if os.path.isfile(path):
    raise errors.UserError(f'{path} is a file, not a folder of checkpoints')
  return path
