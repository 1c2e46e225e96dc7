"""Recipes: loading, overriding, saving and comparing configurations."""

import ast
import contextlib
import difflib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import logging
import pathlib
import runpy
import sys
import traceback
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import expand
from ddpm_jax import ranges
from ddpm_jax.storage import workdir

# Beside the package in a checkout, inside it when installed.
CONFIGS = pathlib.Path(
  next(iter(importlib.import_module('ddpm_jax.configs').__path__))
)
# Sections and keys that may change when a run resumes: they set how long and
# where it trains and what it reports, not what it learns.
FREE = (
  *('steps', 'sampler', 'edit', 'codec', 'evaluate'),
  *('parallel', 'checkpoint', 'log'),
  # Only the location: `workdir.write_data` keeps hashes of the content.
  'data.path',
)
# Sections that may change when a run resumes if --allow names them.
ALLOWED = ('optimizer',)
# Keys that are set from the data if they are 0, once, when a run begins.
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
  """Returns the recipe of --config, or else of --workdir, with `changes` made.

  Args:
    spec: The value of --config, or a recipe.
    folder: The value of --workdir.
    changes: {key: text}, the overrides on the command line.
    values: {key: value}, overrides from Python.
    allow: See `check_same`.
    recover: Whether to replace a damaged or missing config.json by that of the
      newest checkpoint, with a warning, instead of raising.

  Raises:
    UserError: If there is no recipe, it is not valid, or the workdir holds a
      checkpoint of a run with another recipe.
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
    raise errors.UserError(
      f'{where}: choose a recipe, such as --config=configs/digits.py'
    )
  override(config, changes)
  set_keys(config, values or {})
  if folder and begun and workdir.has_checkpoint(folder):
    keep_found(config, begun)
    check_same(config, begun, folder, allow)
  return config


def saved(folder: pathlib.Path, *, recover: bool = False) -> ConfigDict | None:
  """Returns the recipe of the run in `folder`, or None if there is no run.

  Raises:
    UserError: If config.json is damaged, and `recover` is false or there is no
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
        f'{e}; python -m ddpm_jax.main --workdir={folder} repairs it from the '
        'newest checkpoint'
      ) from None
  if begun or not recover:
    return begun
  if found := _of_checkpoint(folder):
    logging.warning('%s: using that of the newest checkpoint', wrong)
  return found


def _of_checkpoint(folder: pathlib.Path) -> ConfigDict | None:
  """Returns the recipe in the newest checkpoint that can be read."""
  from ddpm_jax.storage import checkpoint  # seconds to import

  found = checkpoint.newest_config(folder / 'checkpoints')
  return from_json(found) if found else None


def keep_found(config: ConfigDict, begun: ConfigDict) -> None:
  """Copies the keys that a run has set from its data, where they are 0."""
  here, there = flatten(config), flatten(begun)
  config.update_from_flattened_dict(
    {key: there[key] for key in FROM_DATA if not here[key]}
  )


def load(spec: str) -> ConfigDict:
  """Returns what get_config of FILE or FILE:ARGUMENT returns, locked.

  Raises:
    UserError: If there is no such file, or it is not a recipe.
  """
  name, _, argument = spec.partition(':')
  path = _find(name)
  with _importing_configs(), _one_line(name, path):
    # What a recipe prints must not mix with the output of this program.
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
  """Returns the file `name`, or else the file of that name in CONFIGS."""
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
  """Refuses what is not a recipe, or lacks keys."""
  if type(config) is not ConfigDict:
    raise errors.UserError(
      f'{where} returns {type(config).__name__}, not a ConfigDict: see '
      'configs/digits.py'
    )
  try:
    here, whole = flatten(config), defaults()
    to_json(config)
  except (TypeError, ValueError, RecursionError) as e:
    raise errors.UserError(
      f'{where} returns a recipe that cannot be saved: '
      f'{errors.short(str(e), 200)}'
    ) from None
  lacks = [key for key in whole if key not in here]
  if lacks:
    raise errors.UserError(
      f'{where} returns a recipe without {", ".join(lacks[:3])} '
      f'({len(lacks)} keys are missing): start from base.get_config(), as in '
      'configs/digits.py'
    )


def shipped(name: str) -> ConfigDict:
  """Returns the recipe `name` of configs/, from any working directory.

  Raises:
    UserError: If configs/ is not installed.
  """
  if not CONFIGS.is_dir():
    raise errors.UserError(
      f'configs/ is not installed beside {pathlib.Path(__file__).parent}: '
      'choose a recipe with --config'
    )
  return load(str(CONFIGS / f'{name}.py'))


class _Finder(importlib.abc.MetaPathFinder):
  """Imports `configs` from the working directory first, then from CONFIGS.

  `configs.base` is always that of CONFIGS: every recipe begins with it.
  """

  def find_spec(
    self, name: str, path: Any, target: Any = None
  ) -> importlib.machinery.ModuleSpec | None:
    if name == 'configs.base':
      return importlib.util.spec_from_file_location(name, CONFIGS / 'base.py')
    if name != 'configs':
      return None
    here = pathlib.Path.cwd()
    spec = importlib.machinery.PathFinder.find_spec(name, [str(here)])
    if spec is None:
      spec = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
    spec.submodule_search_locations = [str(here / 'configs'), str(CONFIGS)]
    return spec


@contextlib.contextmanager
def _importing_configs() -> Iterator[None]:
  """Makes `from configs import base` work in a recipe; see `_Finder`.

  Modules that were imported as `configs` before are put back afterwards.
  """

  def known() -> list[str]:
    return [x for x in sys.modules if x.partition('.')[0] == 'configs']

  others = {name: sys.modules.pop(name) for name in known()}
  finder = _Finder()
  sys.meta_path.insert(0, finder)
  try:
    yield
  finally:
    sys.meta_path.remove(finder)
    for name in known():
      del sys.modules[name]
    sys.modules.update(others)


@contextlib.contextmanager
def _one_line(name: str, path: pathlib.Path) -> Iterator[None]:
  """Turns any error in the recipe `path` into a UserError of one line."""
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
  """Sets keys such as `model.channels` from text, parsed by the key's type.

  Raises:
    UserError: If a key is unknown, or a value has another type.
  """
  for key, text in changes.items():
    was = _value(config, key)
    _set(config, key, text if isinstance(was, str) else _parse(text), text)


def set_keys(config: ConfigDict, changes: Mapping[str, Any]) -> None:
  """Sets keys such as `model.channels` to Python values.

  Raises:
    UserError: If a key is unknown, or a value has another type or is out of
      range.
  """
  for key, value in changes.items():
    _set(config, key, _tuples(value), value)
  ranges.check(flatten(config))


def changed_copy(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
  """Returns a copy of a recipe with some keys changed; see `set_keys`."""
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
      others='configs/base.py lists them all',
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
    return text


def _tuples(value: Any) -> Any:
  """Replaces lists by tuples: JSON has only lists, and recipes only tuples."""
  if isinstance(value, dict):
    return {k: _tuples(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return tuple(_tuples(v) for v in value)
  return value


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """{'model.channels': 128, ...}."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict | Mapping):
      flat |= {f'{key}.{k}': v for k, v in flatten(value).items()}
    else:
      flat[key] = value
  return flat


def to_json(config: ConfigDict) -> dict[str, Any]:
  """Returns the resolved recipe as dicts, lists, numbers and strings."""
  return json.loads(config.to_json())


def from_json(values: dict[str, Any]) -> ConfigDict:
  """Returns the recipe that `to_json` has saved.

  Keys that were added to configs/base.py since have its values: the defaults of
  new keys keep the old behaviour.
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
          f'config.json is damaged: {section} is not a section of keys'
        )
    if name not in at:
      at[name] = value
    elif isinstance(at[name], ConfigDict):
      raise errors.UserError(
        f'config.json is damaged: {key} is a section of keys'
      )
  return config.lock()


def provisional(config: ConfigDict) -> ConfigDict:
  """Returns the recipe with one class if the number is not known yet."""
  return filled(config, {'condition.classes': 1})


def filled(config: ConfigDict, found: dict[str, int]) -> ConfigDict:
  """Returns a copy of the recipe, with its zeros set from `found`."""
  config = config.copy_and_resolve_references()
  flat = flatten(config)
  config.update_from_flattened_dict(
    {key: value for key, value in found.items() if not flat[key]}
  )
  return config.lock()


def defaults() -> dict[str, Any]:
  """Returns the flattened configs/base.py; {} if configs/ is not installed."""
  with contextlib.suppress(ImportError):
    base = importlib.import_module('ddpm_jax.configs.base')
    return flatten(base.get_config())
  return {}


def changed(config: ConfigDict, begun: ConfigDict) -> dict[str, list[Any]]:
  """Returns {key: [before, now]} of the keys that differ and are not `FREE`."""
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
  """Refuses a recipe that differs from that of the run.

  Args:
    config: The recipe.
    begun: The recipe that the run was started with.
    where: The run, for messages.
    allow: Sections of `ALLOWED` whose keys may differ too.

  Raises:
    UserError: With the keys that differ.
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
  allowed = ', or allow the change with --allow=optimizer' * may_change
  raise errors.UserError(
    f'{where} was started with another recipe; these keys differ: {listed}. '
    f'Choose another --workdir, or keep their values{allowed}'
  )


def is_another(config: ConfigDict, folder: pathlib.Path) -> bool:
  """Whether the workdir was started with another recipe; see `check_same`."""
  try:
    begun = saved(folder)
  except errors.UserError:
    return True  # config.json is damaged, and there is no checkpoint.
  return bool(begun and changed(config, begun))


def image_size(config: ConfigDict) -> tuple[int, ...]:
  """Returns (height, width) in pixels, or () if the data are points."""
  size = config.data.image_size
  return size if isinstance(size, tuple) else (size, size)


def shape(config: ConfigDict) -> tuple[int, ...]:
  """Returns (height, width, channels) of an image, (channels,) of a point."""
  return (*image_size(config), config.data.channels)


def condition_kind(config: ConfigDict) -> str:
  """Returns the kind of condition: 'label', 'text', or '' for none.

  A user's own encoder takes texts if `data.captions` is set, and labels if not.
  """
  name = config.condition.name
  if '.' in name:
    return 'text' if config.data.captions else 'label'
  return 'text' if name == 'minilm' else name
