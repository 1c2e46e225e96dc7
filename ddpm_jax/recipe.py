"""Recipes: files of configs/, overrides on the command line, JSON."""

import ast
import contextlib
import difflib
import json
import pathlib
import runpy
import sys
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import ranges
from ddpm_jax.runtime import workdir

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
# Sections and keys that may change under a run that has begun: they say how
# long, where and how it is watched, not what is learned.
FREE = (
  *('steps', 'sampler', 'edit', 'codec', 'evaluate'),
  *('parallel', 'checkpoint', 'log'),
)
# Keys whose 0 leaves them to the data; a run that has begun keeps what it was.
FROM_DATA = ('condition.classes', 'data.max_value')


def resolve(
  spec: str | None, folder: pathlib.Path | None, changes: dict[str, str]
) -> ConfigDict:
  """The recipe of --config or else of --workdir, with `changes` made.

  Raises:
    UserError: if there is none, it is wrong, or it is not the one that the
      workdir was begun with. A run without a checkpoint may be begun again
      with another.
  """
  saved = workdir.read_config(folder) if folder else None
  begun = from_json(saved) if saved else None
  if spec:
    config = load(spec)
  elif begun:
    config = begun.copy_and_resolve_references().lock()
  else:
    where = f'{folder} holds no run' if folder else 'no recipe'
    raise errors.UserError(f'{where}: name one, as --config=configs/digits.py')
  override(config, changes)
  ranges.check(flatten(config))
  if folder and begun and workdir.has_checkpoint(folder):
    keep_found(config, begun)
    check_same(config, begun, folder)
  return config


def keep_found(config: ConfigDict, begun: ConfigDict) -> None:
  """Sets what is left to the data to what a run has found in them."""
  here, there = flatten(config), flatten(begun)
  config.update_from_flattened_dict(
    {key: there[key] for key in FROM_DATA if not here[key]}
  )


def load(spec: str) -> ConfigDict:
  """The recipe of FILE or FILE:ARGUMENT: what its get_config returns, locked.

  Raises:
    UserError: if there is no such file, or it is no recipe.
  """
  name, _, argument = spec.partition(':')
  path = pathlib.Path(name)
  if not path.is_file():
    others = [str(p) for p in sorted(path.parent.glob('*.py'))]
    close = difflib.get_close_matches(name, others, n=1, cutoff=0.3)
    hint = f'; did you mean {close[0]}?' if close else ''
    raise errors.UserError(f'no such config: {name}{hint}')
  with _importing_configs(), _one_line(name):
    get_config = runpy.run_path(name)['get_config']
    config = get_config(argument) if argument else get_config()
  return config.lock()


def shipped(name: str) -> ConfigDict:
  """The recipe of that name in configs/, wherever the program was started."""
  return load(str(CONFIGS / f'{name}.py'))


@contextlib.contextmanager
def _importing_configs() -> Iterator[None]:
  """Lets a recipe say `from configs import base`, wherever one stands."""
  checkout = str(CONFIGS.parent)
  sys.path.append(checkout)
  try:
    yield
  finally:
    sys.path.remove(checkout)


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
  try:
    yield
  except errors.UserError:
    raise
  except Exception as e:  # Anything may go wrong in a user's file.
    trace, line = e.__traceback__, ''
    while trace:
      if trace.tb_frame.f_code.co_filename.endswith(name):
        line = f' line {trace.tb_lineno}:'
      trace = trace.tb_next
    reason = ' '.join(str(e).split())
    raise errors.UserError(f'{name}:{line} {type(e).__name__}: {reason}') from e


def override(config: ConfigDict, changes: dict[str, str]) -> None:
  """Sets keys such as `model.channels` from their text, as the type demands.

  Raises:
    UserError: for an unknown key, or a value of another type.
  """
  for key, text in changes.items():
    flat = flatten(config)
    if key not in flat:
      raise errors.unknown(
        'key',
        f'config.{key}',
        [f'config.{k}' for k in flat],
        others='configs/base.py explains them all',
      )
    value = text if isinstance(flat[key], str) else _parse(text)
    try:
      config.update_from_flattened_dict({key: value})
    except (TypeError, ValueError):
      raise errors.UserError(
        f'config.{key}={text}: not of type {type(flat[key]).__name__}, like '
        f'{flat[key]!r}'
      ) from None


def _parse(text: str) -> Any:
  if text.lower() in ('true', 'false'):
    return text.lower() == 'true'
  try:
    return _tuples(ast.literal_eval(text))
  except (ValueError, SyntaxError):
    return text


def _tuples(value: Any) -> Any:
  """JSON knows no tuples, and lists are refused where a tuple stands."""
  if isinstance(value, dict):
    return {k: _tuples(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return tuple(_tuples(v) for v in value)
  return value


def flatten(config: ConfigDict) -> dict[str, Any]:
  """{'model.channels': 128, ...}."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      flat |= {f'{key}.{k}': v for k, v in flatten(value).items()}
    else:
      flat[key] = value
  return flat


def to_json(config: ConfigDict) -> dict[str, Any]:
  """The resolved recipe, of dicts, lists, numbers and strings."""
  return json.loads(config.to_json())


def from_json(values: dict[str, Any]) -> ConfigDict:
  """The recipe that was saved.

  A key that came later has the value of configs/base.py, which changes nothing.
  """
  config = ConfigDict(_tuples(values))
  for key, value in defaults().items():
    *sections, name = key.split('.')
    at = config
    for section in sections:
      if section not in at:
        at[section] = ConfigDict()
      at = at[section]
      if not isinstance(at, ConfigDict):
        raise errors.UserError(
          f'config.json is damaged: {section} is no section of keys'
        )
    if name not in at:
      at[name] = value
  return config.lock()


def defaults() -> dict[str, Any]:
  """The flattened configs/base.py; {} where configs/ is not here."""
  with contextlib.suppress(ImportError), _importing_configs():
    from configs import base

    return flatten(base.get_config())
  return {}


def check_same(config: ConfigDict, begun: ConfigDict, where: Any) -> None:
  """Refuses a recipe that is not the one that was begun.

  Raises:
    UserError: naming the keys outside `FREE` that differ. A path of the data
      that was not named, as in an imported run, may be.
  """
  here, there = flatten(config), flatten(begun)
  if not there.get('data.path'):
    there['data.path'] = here.get('data.path')
  for key in FROM_DATA:
    if not (here.get(key) and there.get(key)):
      there[key] = here.get(key)
  changed = [
    f'{key} ({there.get(key, "absent")!r} -> {here.get(key, "absent")!r})'
    for key in here | there
    if here.get(key) != there.get(key) and key.split('.')[0] not in FREE
  ]
  if changed:
    raise errors.UserError(
      f'{where} was begun with another recipe; these keys differ: '
      f'{", ".join(changed)}. Name another --workdir, or leave them be'
    )


def is_another(config: ConfigDict, folder: pathlib.Path) -> bool:
  """Whether the workdir was begun with another recipe; see `check_same`."""
  saved = workdir.read_config(folder)
  try:
    check_same(config, from_json(saved) if saved else config, folder)
  except errors.UserError:
    return True
  return False


def image_size(config: ConfigDict) -> tuple[int, ...]:
  """(height, width) in pixels, or () where the data are points."""
  size = config.data.image_size
  return size if isinstance(size, tuple) else (size, size)


def shape(config: ConfigDict) -> tuple[int, ...]:
  """Of one example: (height, width, channels), or (channels,) of a point."""
  return (*image_size(config), config.data.channels)
