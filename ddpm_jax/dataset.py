"""From a recipe to data: the source, and the condition of each example."""

import hashlib
import logging
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import npz
from ddpm_jax import recipe
from ddpm_jax.data import captions
from ddpm_jax.data import contents
from ddpm_jax.data import sources
from ddpm_jax.data import store
from ddpm_jax.interop import minilm
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage import paths
from ddpm_jax.storage import workdir


def source(
  config: ConfigDict, split: str = '', folder: pathlib.Path | None = None
) -> store.Source:
  """The data set, or another split of it; see `data/sources.py`.

  Args:
    config: the recipe.
    split: '': that of the recipe.
    folder: of the run whose order of classes it takes over.

  Raises:
    UserError: the data are missing or do not fit, or have no splits and one is
      named.
  """
  paths.of_key('data.path', config.data.get('path') or '.', paths.local)
  function = build.member(sources, config.data.name, 'data set')
  if not build.reads(function, 'split'):
    _refuse_split(config, 'data.split', config.data.split, 'train')
  data = dict(config.data) | {'image_size': recipe.image_size(config)}
  data |= {'split': split} if split else {}
  data['needs_labels'] = (
    recipe.condition_kind(config) == 'label'
    or config.data.captions == 'classes'
  )
  if (
    folder
    and build.reads(function, 'class_order')
    and workdir.keeps_no_classes(folder)
  ):
    data |= {'class_order': str}  # that of runs which saved no names
  made = build.call(function, data, of='data')
  if folder and checkpoint.steps(folder / 'checkpoints'):
    made = _as_saved(config, made, folder)
  return _with_condition(config, made)


def _with_condition(config: ConfigDict, source: store.Source) -> store.Source:
  """The source, with the texts of a condition if it is of texts.

  Raises:
    UserError: if it has no such labels or captions.
  """
  c, data = config.condition, config.data
  kind = recipe.condition_kind(config)
  if kind == 'label' and not source.class_names:
    raise errors.UserError(
      f'the data set {data.name} has no classes here, and '
      'config.condition.name=label needs them'
    )
  if kind == 'label' and c.classes not in (0, len(source.class_names)):
    raise errors.UserError(
      f'the data have {len(source.class_names)} classes: set '
      f'config.condition.classes to that, not {c.classes}, or leave it out'
    )
  if kind != 'text':
    return source

  def encoded(texts: list[str]) -> Any:
    return encode(config, texts)

  if data.captions == 'classes':
    names = data.names or source.class_names
    if len(names) != len(source.class_names):
      raise errors.UserError(
        f'config.data.names has {len(names)} names for the '
        f'{len(source.class_names)} classes of the data'
      )
    texts = captions.of_classes(names, tuple(data.templates))
    return captions.attach(source, texts, 'label', encoded)
  if not source.captions:
    raise errors.UserError(
      f'config.condition.name={c.name} needs captions: set '
      'config.data.captions=classes, or file for a folder that has them, or to '
      'a feature of texts of a TFDS set'
    )
  return captions.attach(source, source.captions, 'id', encoded)


def encode(config: ConfigDict, texts: Sequence[str]) -> Any:
  """Texts as arrays with a row each, as the encoder of the recipe takes them.

  Raises:
    UserError: for a text that is too long, or an encoder that is not there.
  """
  c = config.condition
  if c.name != 'minilm':
    return captions.tokens(texts, c.length)
  # What a frozen encoder says never changes.
  identity = repr((c.name, c.length, *texts)).encode()
  cache = workdir.cache()
  if cache is None:
    return minilm.encode(texts, c.length)
  path = cache / f'{hashlib.sha256(identity).hexdigest()[:32]}.npz'
  if not path.exists():
    made: Any = minilm.encode(texts, c.length)
    with paths.atomic_write(path) as part, part.open('wb') as file:
      np.savez(file, **made)
  return npz.load(path)


def changed_data(now: contents.Contents, folder: pathlib.Path) -> str:
  """How the data differ from those that the run was begun with; or ''.

  Runs of earlier versions did not keep what theirs were.
  """
  saved = workdir.read_data(folder)
  if saved is None:
    return ''
  return contents.changes(contents.Contents(*saved), now)


def _as_saved(
  config: ConfigDict, made: store.Source, folder: pathlib.Path
) -> store.Source:
  """The source with its classes in the order that the run has saved."""
  names = workdir.read_classes(folder)
  if names is None or names == made.class_names:
    return made
  if sorted(names) == sorted(made.class_names) and len(set(names)) == len(
    names
  ):
    return store.relabelled(made, names)
  if reads_classes(config):
    raise other_classes(made.class_names, names, folder)
  return made


def other_classes(
  here: Sequence[str], saved: Sequence[str], folder: pathlib.Path
) -> errors.UserError:
  """The error for data whose classes are not those of the run."""
  new = [f'{name!r} is new' for name in here if name not in saved]
  gone = [f'{name!r} is missing' for name in saved if name not in here]
  return errors.UserError(
    f'the classes of the data are not those of {folder}/classes.json '
    f'({", ".join([*new[:2], *gone[:2]])}): give it the data that it was begun '
    'with, or name another --workdir'
  )


def split_to_evaluate(config: ConfigDict) -> str:
  """The name of the split to evaluate on; 'all' for data without splits.

  Raises:
    UserError: the data have no splits, and one is named.
  """
  function = build.member(sources, config.data.name, 'data set')
  if build.reads(function, 'split'):
    return config.evaluate.split or config.data.split
  _refuse_split(config, 'evaluate.split', config.evaluate.split, '')
  return 'all'


def source_to_evaluate(
  config: ConfigDict, folder: pathlib.Path | None = None
) -> tuple[store.Source, str]:
  """The images to evaluate on, and the name of their split; see `source`.

  Warns if they are the training data, and those have changed.
  """
  name = split_to_evaluate(config)
  found = source(config, config.evaluate.split, folder)
  if folder and config.evaluate.split in ('', config.data.split):
    warn_of_data(found, folder)
  return found, name


def warn_of_data(source: store.Source, folder: pathlib.Path) -> None:
  """Warns if the data are not those that the run was begun with."""
  if differ := changed_data(source.held(), folder):
    logging.warning(
      'the data are not those that %s was trained on: %s', folder, differ
    )


def _refuse_split(
  config: ConfigDict, key: str, value: str, default: str
) -> None:
  if value != default:
    raise errors.UserError(
      f'config.{key}={value}: the data set {config.data.name} has no splits; '
      f"set config.{key}='{default}'"
    )


def settled(config: ConfigDict, source: store.Source) -> ConfigDict:
  """The recipe with what it leaves to the data; see `recipe.FROM_DATA`."""
  found = {'data.max_value': source.max_value}
  if recipe.condition_kind(config) == 'label':
    found['condition.classes'] = len(source.class_names)
  return recipe.filled(config, found)


def reads_classes(config: ConfigDict) -> bool:
  """Whether the network is told the classes of the data, or texts of them."""
  kind = recipe.condition_kind(config)
  return kind == 'label' or (bool(kind) and config.data.captions == 'classes')


def of_data(config: ConfigDict, source: store.Source, count: int) -> Any:
  """Texts of `count` examples, one after another; None for other conditions."""
  if recipe.condition_kind(config) != 'text':
    return None
  batch = source.gather(np.arange(count, dtype=np.int32) % len(source))
  return build.condition(config, {'text': batch['text']})


def conditions(
  config: ConfigDict,
  prompts: Sequence[str],
  labels: Sequence[str],
  *,
  folder: pathlib.Path | None,
) -> Any:
  """Prompts or labels as arrays with a row for each; None without either.

  Args:
    config: The recipe.
    prompts: Texts, for a model of texts.
    labels: Names or numbers of classes, for a model of classes.
    folder: The workdir, which holds the names of the classes.

  Raises:
    UserError: If the model has no such condition, or no such class, or needs
      a prompt and none is given.
  """
  kind = config.condition.name
  if labels and kind != 'label':
    raise errors.UserError(
      '--label is for models of config.condition.name=label'
    )
  if prompts and kind in ('', 'label'):
    raise errors.UserError(
      '--prompt is for models of config.condition.name=text'
    )
  if labels:
    saved = (folder and workdir.read_classes(folder)) or ()
    numbers = [class_number(config, x, saved) for x in labels]
    return np.array(numbers, np.int32)
  if prompts:
    return encode(config, prompts)
  if kind not in ('', 'label') and config.condition.drop == 0:
    raise errors.UserError(
      'name a --prompt: with config.condition.drop=0 the network was never '
      'trained without one'
    )
  return None


def class_number(
  config: ConfigDict, name: str, saved: Sequence[str] = ()
) -> int:
  """Of a class by its name, or else by its number.

  Its name is in `config.data.names` or among those `saved` with the run.

  Raises:
    UserError: if there is none.
  """
  classes = config.condition.classes
  for names in (list(config.data.names)[:classes], list(saved)):
    if name in names:
      return names.index(name)
  if not name.isdecimal() or int(name) >= classes:
    known = config.data.names or saved or [str(i) for i in range(classes)]
    raise errors.UserError(
      f'--label={name}: there are {classes} classes, {listed(known)}'
    )
  return int(name)


def class_title(
  config: ConfigDict, number: int, saved: Sequence[str] = ()
) -> str:
  """What to call a class: its name if it is known, or else its number."""
  names = config.data.names or saved
  return names[number] if number < len(names) else str(number)


def listed(names: Sequence[str]) -> str:
  """'0 cat, 1 dog, ...', cut to fit a line."""
  if list(names) == [str(i) for i in range(len(names))]:
    return f'0 to {len(names) - 1}'
  every = ', '.join(f'{i} {name}' for i, name in enumerate(names))
  return textwrap.shorten(every, 200, placeholder=' ...')
