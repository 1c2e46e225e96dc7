"""Saves checkpoints with Orbax, and restores the newest intact one.

A checkpoint is `state`, `ema`, and `about`: JSON with the caller's `data` and
`config`, the type and a fingerprint of every array, and its own CRC. The
fingerprints are needed because neither Orbax nor its storage format notices
flipped bits in array data: nearly all of them load without an error.
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

# A file of a checkpoint is missing, or is a folder, or the reverse.
_ABSENT = FileNotFoundError, NotADirectoryError, IsADirectoryError
_STORAGE = re.compile(
  'PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|'
  'RESOURCE_EXHAUSTED|CANCELLED|OS error code: '
)
_CONTENT = re.compile('NOT_FOUND|OS error code: (2|20|21):')
_UNTOUCHED = 'those already there are as they were'

Path = str | os.PathLike[str]


# The save that each checkpointer has started, until `wait`: the thread and the
# files that Orbax opens for a save are only released by asking for its result.
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
  """Opens the folder `path` for checkpoints; makes it if needed.

  Keeps the newest `keep` checkpoints, and those at multiples of `keep_every`
  (0: none). Removes what interrupted saves have left behind.

  Raises:
    UserError: If `keep` < 1, or `path` is not a writable folder.
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
  tuples are restored as lists). Does nothing if the step is saved already.

  Raises:
    UserError: If this save or the one before it has failed.
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
    # Without `force` Orbax skips saves that its own policy finds too early.
    _under_way[checkpointer] = checkpointer.save_checkpointables_async(
      step, items, force=True
    )


def trained(state: Any) -> dict[str, Any]:
  """Returns the item `state` of a training state: all but the EMA weights."""
  kept = {
    'step': state.step,
    'params': state.params,
    'opt_state': state.opt_state,
  }
  return kept if state.history is None else kept | {'history': state.history}


def wait(checkpointer: ocp.training.Checkpointer) -> None:
  """Waits until the save is finished. Raises UserError if it has failed."""
  with _saving(checkpointer.directory, checkpointer):
    try:
      checkpointer.wait()
    finally:
      if save := _under_way.pop(checkpointer, None):
        save.result()


def close(checkpointer: ocp.training.Checkpointer) -> None:
  """Waits for the save, then closes. Raises UserError if it has failed."""
  try:
    with processes.one_fails_all():  # else closing waits for the others
      wait(checkpointer)
  finally:
    checkpointer.close()


def steps(path: Path) -> list[int]:
  """Returns the steps of finished checkpoints, ascending; [] without a folder.

  Raises:
    UserError: If `path` is a file, or cannot be read.
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
  """Restores the newest intact checkpoint; None if there is no checkpoint.

  The abstract trees are `jax.ShapeDtypeStruct`s with the shardings to restore
  to, which may differ from the saved ones. Damaged checkpoints are skipped with
  a warning. If `source` is a checkpointer, they are also renamed once an older
  one has loaded, as the run will save these steps again.

  Raises:
    UserError: If all are damaged, or the newest intact one is of another model.
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
  """Restores one item of the newest intact checkpoint, or of that at `step`.

  Returns:
    (step, item).

  Raises:
    UserError: If there is none, it is damaged, or it is of another model.
    RunError: If the item holds numbers that are not finite.
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
  """Returns the `config` of the newest checkpoint that has one, or None.

  Does not read the arrays, and does not wait for other processes.

  Raises:
    UserError: If the storage fails.
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
  raise errors.UserError(f'no intact checkpoint in {path}; damaged: {names}')


def _try(folder: str, abstract: dict[str, Any]) -> tuple[dict[str, Any], str]:
  """Returns (items, '') of an intact checkpoint, ({}, reason) of a damaged one.

  Raises:
    UserError: If the storage fails.
  """
  items, wrong, unreadable = {}, '', False
  # These are errors of the caller or the device, not of the checkpoint.
  others = errors.UserError, jax.errors.JaxRuntimeError, MemoryError
  with _hushed():
    try:
      items = _load(folder, abstract)
    except Exception as error:
      if isinstance(_root(error), others):
        raise
      wrong, unreadable = _line(error), _unreadable(error)
      if closed := None if unreadable else _closed_folder(folder):
        # Orbax treats the content of such a folder as missing.
        wrong, unreadable = _line(closed), True
    if wrong:
      # Let the abandoned reads finish while their messages are suppressed.
      gc.collect()
      time.sleep(0.5)
      gc.collect()
  if unreadable:
    raise _cannot_read(folder, wrong)
  # Each process reads its own part, but all must use the same step.
  if not np.all(multihost_utils.process_allgather(np.array(not wrong))):
    return {}, wrong or 'another process could not read it'
  saved = items['about']['arrays']
  now = fingerprint.describe({item: items[item] for item in abstract})
  changed = [name for name in now if now[name] != saved[name]]
  return items, f'the bytes of {changed[0]} have changed' if changed else ''


def _cannot_read(folder: str, wrong: str) -> errors.UserError:
  return errors.UserError(
    f'cannot read checkpoint {folder} ({wrong}): nothing is changed; correct '
    'that, and try again'
  )


def _unreadable(error: BaseException) -> bool:
  """Whether the storage has failed: the checkpoint itself may be intact."""
  seen: BaseException | None = error
  while seen:
    if isinstance(seen, OSError) and not isinstance(seen, _ABSENT):
      # An OSError about the content, raised by Python itself, has no errno.
      return seen.errno is not None
    # TensorStore raises a ValueError whose text has Abseil's code and, for file
    # systems, that of the operating system.
    if _STORAGE.search(str(seen)) and not _CONTENT.search(str(seen)):
      return True
    seen = seen.__cause__ or seen.__context__
  return False


def _closed_folder(folder: str) -> OSError | None:
  """Returns why a folder in the checkpoint cannot be listed, or None."""
  failed: list[OSError] = []
  for _ in os.walk(folder, onerror=failed.append):
    pass
  return next((e for e in failed if not isinstance(e, _ABSENT)), None)


def _load(folder: str, abstract: dict[str, Any]) -> dict[str, Any]:
  """Returns the items of `abstract`, and `about`; any error means damage."""
  about = _about(folder)
  with _context(alone=True):
    _check_model(folder, about['arrays'], abstract)
    return {**ocp.load_checkpointables(folder, abstract), 'about': about}


def _about(folder: str) -> dict[str, Any]:
  """Returns `about`; any error means damage."""
  with _context(alone=True):
    about = ocp.load_checkpointables(folder, {'about': None})['about']
  if about.pop('crc32') != fingerprint.crc32(about):
    raise ValueError('the bytes of about have changed')
  # Checkpoints of earlier versions have no step.
  step = about.get('step')
  if step is not None and str(step) != os.path.basename(folder):
    raise ValueError(f'it is of step {step}, under another name')
  return about


def _check_model(
  folder: str, saved: dict[str, Any], abstract: dict[str, Any]
) -> None:
  # Orbax casts dtypes silently, and its error for a wrong shape is obscure.
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
  """Returns settings of Orbax.

  Args:
    alone: Whether this process reads without waiting for the others.
  """
  logging.getLogger('absl').addFilter(_drop_orbax)
  context = ocp.Context()
  registry = ocp.handlers.local_registry()
  # By default each number of a dict would be saved as an array.
  registry.add(ocp.handlers.JsonHandler, checkpointable_name='about')
  context.checkpointables.registry = registry
  context.array.saving.use_compression = False  # 7% smaller, 40% slower.
  # Created in the background, a folder that fails is noticed five minutes late.
  context.asynchronous.create_directories_asynchronously = False
  if alone:
    # Otherwise, if one process cannot read, the others wait 20 minutes for it.
    me = jax.process_index()
    context.multiprocessing.primary_host = me
    context.multiprocessing.active_processes = {me}
    context.multiprocessing.barrier_sync_key_prefix = f'process_{me}'
  return context


def _drop_orbax(record: logging.LogRecord) -> bool:
  # Orbax logs pages of INFO, warns about every save that takes over a second,
  # and logs each error that it raises a dozen times. Other records stay.
  if os.path.join('orbax', 'checkpoint') not in record.pathname:
    return True
  error = record.exc_info[1] if record.exc_info else None
  if isinstance(error, Exception) and record.threadName == 'async_save':
    # Orbax raises it only after waiting up to 20 minutes for the others.
    message = f'cannot save a checkpoint ({_line(error)}); {_UNTOUCHED}'
    processes.end_all(errors.UserError(message))
  return False


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
  """Suppresses the pages that Python prints about reads that Orbax abandons."""
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
      checkpointer.reload()  # Otherwise the failed step counts as saved.
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
