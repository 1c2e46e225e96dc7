"""Recipes: files of configs/, overrides on the command line, JSON."""

import ast
import contextlib
import difflib
import importlib
import inspect
import json
import logging
import pathlib
import runpy
import sys
import traceback
import types
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import expand
from ddpm_jax import ranges
from ddpm_jax.storage import workdir

# Beside this package in a checkout, in it where it was installed.
CONFIGS = next(
  (
    path
    for path in (
      pathlib.Path(__file__).parent / 'configs',
      pathlib.Path(__file__).parents[1] / 'configs',
    )
    if path.is_dir()
  ),
  pathlib.Path(__file__).parents[1] / 'configs',
)
# Sections and keys that may change under a run that has begun: they say how
# long, where and how it is watched, not what is learned.
FREE = (
  *('steps', 'sampler', 'edit', 'codec', 'evaluate'),
  *('parallel', 'checkpoint', 'log'),
  # Where the data are; what they are is kept by `workdir.write_data`.
  'data.path',
)
# Sections that may change under a run where --allow names them.
ALLOWED = ('optimizer',)
# Keys whose 0 leaves them to the data; a run that has begun keeps what it was.
FROM_DATA = ('condition.classes', 'data.max_value')


def resolve(
  spec: str | ConfigDict | None,
  folder: pathlib.Path | None,
  changes: dict[str, str],
  *,
  values: Mapping[str, Any] | None = None,
  allow: Collection[str] = (),
  recover: bool = False,
) -> ConfigDict:
  """The recipe of --config or else of --workdir, with `changes` made.

  Args:
    spec: --config, or a recipe.
    folder: --workdir.
    changes: {key: text} of the command line.
    values: {key: value} of Python.
    allow: see `check_same`.
    recover: whether a config.json that is damaged or missing is read from the
      newest checkpoint instead, with a warning; else it is refused.

  Raises:
    UserError: if there is none, it is wrong, or it is not the one that the
      workdir was begun with. A run without a checkpoint may be begun again
      with another.
  """
  begun = saved(folder, recover=recover) if folder else None
  if isinstance(spec, ConfigDict):
    config = spec
  elif spec:
    config = load(spec)
  elif begun:
    config = begun.copy_and_resolve_references().lock()
  else:
    where = f'{folder} holds no run' if folder else 'no recipe'
    raise errors.UserError(f'{where}: name one, as --config=configs/digits.py')
  override(config, changes)
  set_keys(config, values or {})
  if folder and begun and workdir.has_checkpoint(folder):
    keep_found(config, begun)
    check_same(config, begun, folder, allow)
  return config


def saved(folder: pathlib.Path, *, recover: bool = False) -> ConfigDict | None:
  """The recipe that the run in `folder` was begun with; None if none was.

  Raises:
    UserError: config.json is damaged, and `recover` is false or there is no
      checkpoint.
  """
  try:
    values = workdir.read_config(folder)
    begun = from_json(values) if values else None
    if begun and recover:
      ranges.check(flatten(begun))
    wrong = '' if begun else f'{folder} has no config.json'
  except errors.UserError as e:
    begun, wrong = None, str(e)
    if 'config.json' not in wrong:
      wrong = f'{folder}/config.json is damaged: {wrong}'
    if not workdir.has_checkpoint(folder):
      raise
    if not recover:
      raise errors.UserError(
        f'{e}; python -m ddpm_jax.main --workdir={folder} mends it from the '
        'newest checkpoint'
      ) from None
  if begun or not recover:
    return begun
  if found := _of_checkpoint(folder):
    logging.warning('%s: it is taken from the newest checkpoint', wrong)
  return found


def _of_checkpoint(folder: pathlib.Path) -> ConfigDict | None:
  """The recipe in the newest checkpoint that can be read."""
  from ddpm_jax.storage import checkpoint  # seconds to import

  found = checkpoint.newest_config(folder / 'checkpoints')
  return from_json(found) if found else None


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
  path = _find(name)
  with _importing_configs(), _one_line(name, path):
    # What it prints is no output of this program.
    with contextlib.redirect_stdout(sys.stderr):
      get_config = runpy.run_path(str(path)).get('get_config')
      if not inspect.isfunction(get_config):
        raise errors.UserError(
          f'{name} has no function get_config: see configs/digits.py'
        )
      where = f'{name}: line {get_config.__code__.co_firstlineno}: get_config'
      try:
        arguments = [argument] if argument else []
        inspect.signature(get_config).bind(*arguments)
      except TypeError as e:
        given = f':{errors.short(argument)}' if argument else 'no :ARGUMENT'
        raise errors.UserError(f'{where} with {given}: {e}') from None
      config = get_config(*arguments)
    _check_kind(where, config)
  return config.lock()


def _find(name: str) -> pathlib.Path:
  """The file of that name, or else the one of configs/, wherever that is."""
  path = pathlib.Path(expand.expanded(name))
  if path.is_file():
    return path
  if path.is_dir():
    raise errors.UserError(f'--config={name} is a folder: name a file in it')
  if path.parent == pathlib.Path('configs') and (CONFIGS / path.name).is_file():
    return CONFIGS / path.name
  others = [str(p) for p in sorted(path.parent.glob('*.py'))]
  close = difflib.get_close_matches(name, others, n=1, cutoff=0.3)
  hint = f'; did you mean {close[0]}?' if close else ''
  raise errors.UserError(f'no such config: {name}{hint}')


def _check_kind(where: str, config: Any) -> None:
  """Refuses what is no recipe, or not a whole one."""
  if type(config) is not ConfigDict:
    raise errors.UserError(
      f'{where} returns {type(config).__name__} where a ConfigDict is wanted: '
      'see configs/digits.py'
    )
  try:
    here, whole = flatten(config), defaults()
    to_json(config)
  except (TypeError, ValueError, RecursionError) as e:
    raise errors.UserError(
      f'{where} returns what cannot be saved: {errors.short(str(e), 200)}'
    ) from None
  lacks = [key for key in whole if key not in here]
  if lacks:
    raise errors.UserError(
      f'{where} returns a recipe without {", ".join(lacks[:3])} '
      f'({len(lacks)} in all): begin with base.get_config(), as '
      'configs/digits.py does'
    )


def shipped(name: str) -> ConfigDict:
  """The recipe of that name in configs/, wherever the program was started.

  Raises:
    UserError: if configs/ is not here.
  """
  if not CONFIGS.is_dir():
    raise errors.UserError(
      f'configs/ is not installed beside {pathlib.Path(__file__).parent}: name '
      'a recipe with --config'
    )
  return load(str(CONFIGS / f'{name}.py'))


@contextlib.contextmanager
def _importing_configs() -> Iterator[None]:
  """Lets a recipe say `from configs import base`, and get this program's.

  A folder of the same name may be where a user works: its other files can be
  imported too.
  """

  def known() -> list[str]:
    return [x for x in sys.modules if x.partition('.')[0] == 'configs']

  others = {name: sys.modules.pop(name) for name in known()}
  package = types.ModuleType('configs')
  package.__path__ = [str(CONFIGS), str(pathlib.Path('configs').absolute())]
  sys.modules['configs'] = package
  try:
    yield
  finally:
    for name in known():
      del sys.modules[name]
    sys.modules.update(others)


@contextlib.contextmanager
def _one_line(name: str, path: pathlib.Path) -> Iterator[None]:
  """Says what goes wrong in the file `path`, which the user called `name`."""
  try:
    yield
  except (errors.UserError, KeyboardInterrupt):
    raise
  except BaseException as e:  # Anything may go wrong in a user's file.
    lines = [
      frame.lineno
      for frame in traceback.extract_tb(e.__traceback__)
      if frame.filename == str(path)
    ]
    if isinstance(e, SyntaxError) and e.filename == str(path):
      lines, e.filename, e.lineno = [e.lineno], None, None
    where = f' line {lines[-1]}:' if lines else ''
    reason = ' '.join(str(e).split())
    raise errors.UserError(
      f'{name}:{where} {type(e).__name__}: {reason:.500}'
    ) from e


def override(config: ConfigDict, changes: Mapping[str, str]) -> None:
  """Sets keys such as `model.channels` from text, parsed as the key's type.

  Raises:
    UserError: For an unknown key, or a value of another type.
  """
  for key, text in changes.items():
    was = _value(config, key)
    _set(config, key, text if isinstance(was, str) else _parse(text), text)


def set_keys(config: ConfigDict, changes: Mapping[str, Any]) -> None:
  """Sets keys such as `model.channels` to values of Python.

  Raises:
    UserError: For an unknown key, or a value of another type or out of range.
  """
  for key, value in changes.items():
    _set(config, key, _tuples(value), value)
  ranges.check(flatten(config))


def changed_copy(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
  """A copy of a recipe with other values of some keys; see `set_keys`."""
  config = config.copy_and_resolve_references()
  set_keys(config, changes)
  return config.lock()


def _value(config: ConfigDict, key: str) -> Any:
  flat = flatten(config)
  if key not in flat:
    raise errors.unknown(
      'key',
      f'config.{key}',
      [f'config.{k}' for k in flat],
      others='configs/base.py explains them all',
    )
  return flat[key]


def _set(config: ConfigDict, key: str, value: Any, said: Any) -> None:
  was = _value(config, key)
  try:
    config.update_from_flattened_dict({key: value})
  except (TypeError, ValueError):
    raise errors.UserError(
      f'config.{key}={errors.short(said)}: not of type '
      f'{type(was).__name__}, like {was!r}'
    ) from None


def _parse(text: str) -> Any:
  if text.lower() in ('true', 'false'):
    return text.lower() == 'true'
  try:
    return _tuples(ast.literal_eval(text))
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return text  # also what is nested too deep to be read


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
    elif isinstance(at[name], ConfigDict):
      raise errors.UserError(
        f'config.json is damaged: {key} is a section of keys'
      )
  return config.lock()


def provisional(config: ConfigDict) -> ConfigDict:
  """The recipe with some number of classes, before the data are read."""
  return filled(config, {'condition.classes': 1})


def filled(config: ConfigDict, found: dict[str, int]) -> ConfigDict:
  """A copy of the recipe, with the keys `found` where they are 0."""
  config = config.copy_and_resolve_references()
  flat = flatten(config)
  config.update_from_flattened_dict(
    {key: value for key, value in found.items() if not flat[key]}
  )
  return config.lock()


def defaults() -> dict[str, Any]:
  """The flattened configs/base.py; {} where configs/ is not here."""
  with contextlib.suppress(ImportError), _importing_configs():
    base = importlib.import_module('configs.base')
    return flatten(base.get_config())
  return {}


def changed(config: ConfigDict, begun: ConfigDict) -> dict[str, list[Any]]:
  """{key: [before, now]} of the keys that differ, but for those in `FREE`."""
  here, there = flatten(config), flatten(begun)
  for key in FROM_DATA:
    if not (here.get(key) and there.get(key)):
      there[key] = here.get(key)
  return {
    key: [there.get(key), here.get(key)]
    for key in here | there
    if here.get(key) != there.get(key)
    and not {key, key.split('.')[0]} & {*FREE}
  }


def check_same(
  config: ConfigDict,
  begun: ConfigDict,
  where: Any,
  allow: Collection[str] = (),
) -> None:
  """Refuses a recipe that is not the one that was begun.

  Args:
    config: the recipe.
    begun: that of the run.
    where: what to call the run.
    allow: sections of `ALLOWED` whose keys may differ too.

  Raises:
    UserError: naming the keys that differ.
  """
  differ = {
    key: values
    for key, values in changed(config, begun).items()
    if key.split('.')[0] not in allow
  }
  if not differ:
    return
  listed = ', '.join(
    f'{key} ({was!r} -> {now!r})' for key, (was, now) in differ.items()
  )
  may_change = all(key.split('.')[0] in ALLOWED for key in differ)
  mend = ', or change them on purpose with --allow=optimizer' * may_change
  raise errors.UserError(
    f'{where} was begun with another recipe; these keys differ: {listed}. Name '
    f'another --workdir, or leave them be{mend}'
  )


def is_another(config: ConfigDict, folder: pathlib.Path) -> bool:
  """Whether the workdir was begun with another recipe; see `check_same`."""
  try:
    begun = saved(folder)
  except errors.UserError:
    return True  # It is damaged, and there is no checkpoint.
  return bool(begun and changed(config, begun))


def image_size(config: ConfigDict) -> tuple[int, ...]:
  """(height, width) in pixels, or () where the data are points."""
  size = config.data.image_size
  return size if isinstance(size, tuple) else (size, size)


def shape(config: ConfigDict) -> tuple[int, ...]:
  """Of one example: (height, width, channels), or (channels,) of a point."""
  return (*image_size(config), config.data.channels)


def condition_kind(config: ConfigDict) -> str:
  """What the network takes beside x_t and t: 'label', 'text', or '' nothing.

  An encoder of a user's own takes texts where `data.captions` is set, and else
  labels.
  """
  name = config.condition.name
  if '.' in name:
    return 'text' if config.data.captions else 'label'
  return 'text' if name == 'minilm' else name
