"""The Python API: `ddpm_jax.load`, `ddpm_jax.train` and `ddpm_jax.get_config`.

It runs the same code as the command line. Mistakes raise `UserError`, and
nothing is printed unless `progress` is set.
"""

import copy
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import pretrained
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax import trainer
from ddpm_jax import validate
from ddpm_jax.data import arrayfile
from ddpm_jax.data import image_folder
from ddpm_jax.data import store
from ddpm_jax.interop import files
from ddpm_jax.storage import logs
from ddpm_jax.storage import paths
from ddpm_jax.storage import workdir as workdirs

Path = str | os.PathLike[str]


def get_config(config: str | ConfigDict, **keys: Any) -> ConfigDict:
  """Returns a recipe with other values of some keys.

  >>> config = ddpm_jax.get_config('configs/digits.py', optimizer={'ema': 0.99})

  Args:
    config: A recipe: the name of a shipped one, such as 'configs/digits.py', a
      path, or what `get_config` returned.
    **keys: Keys of configs/base.py: a value for a top-level key, or a mapping
      for a section.

  Raises:
    UserError: If there is no such recipe or key, or a value is not valid.
  """
  if isinstance(config, ConfigDict):
    config = copy.deepcopy(config).unlock()
  else:
    config = recipe.load(str(config)).unlock()
  changes = recipe.flatten(keys)
  recipe.set_keys(config, changes)
  validate.unread(config, changes, changes)
  return config.lock()


def _check_float32() -> None:
  """Refuses 64-bit numbers: with them, a run would not be the same run.

  Raises:
    UserError: If they are enabled in JAX.
  """
  if jax.config.values['jax_enable_x64']:
    raise errors.UserError(
      'ddpm_jax computes in float32, and JAX has 64-bit numbers enabled: unset '
      "JAX_ENABLE_X64, or call jax.config.update('jax_enable_x64', False)"
    )


def load(
  path: Path,
  *,
  step: int | None = None,
  weights: str | None = None,
  config: str | None = None,
  progress: bool = False,
  **keys: Any,
) -> runs.Run:
  """Opens a trained run, or a model of diffusers.

  >>> run = ddpm_jax.load('runs/digits')
  >>> images = run.sample(16, seed=1)

  Args:
    path: A workdir; or a diffusers folder, its name on huggingface.co, or a
      .ckpt file of pytorch_diffusion.
    step: The checkpoint; by default the newest intact one.
    weights: 'ema' or 'raw'; by default as the recipe says.
    config: Another recipe, by name or path. A workdir refuses one that differs
      from its own; a .ckpt file needs one.
    progress: Whether to show messages.
    **keys: Other values of keys that may change after training, such as
      `sampler={'steps': 50}`; and `condition={'classes': N}`, which a model of
      diffusers with classes needs.

  Raises:
    UserError: If there is no such run or checkpoint, or a key is not valid.
  """
  _check_float32()
  changes = recipe.flatten(keys)
  if weights is not None:
    changes['sampler.weights'] = weights
  with logs.shown(progress):
    folder = paths.path(os.fspath(path))
    is_model = any((folder / name).exists() for name in files.SCHEDULER)
    if folder.is_dir() and not is_model:
      workdirs.check_run(folder)
      found = recipe.resolve(config, folder, {}, values=changes)
      validate.unread(found, changes, changes)
      found = validate.fit_devices(found, trains=False)
      validate.check(found)
      return runs.load(found, folder, step=step)
    for name, value in (('step', step), ('weights', weights)):
      if value is not None:
        raise errors.UserError(f'{name}={value}: {path} is not a workdir')
    model = pretrained.read(os.fspath(path), config, values=changes)
    return runs.Run(
      *(None, model.config, build.engine(model.config), 'EMA', 0),
      *(model.params, model.config.seed),
    )


def train(
  config: str | ConfigDict,
  *,
  data: Any = None,
  workdir: Path,
  num_samples: int = 64,
  progress: bool = False,
  **keys: Any,
) -> runs.Run:
  """Trains a model, or resumes the run in a workdir.

  Ctrl-C saves a checkpoint and returns the run; a second one raises
  KeyboardInterrupt.

  >>> run = ddpm_jax.train(
  ...   'configs/digits.py', data=images, workdir='runs/mine', steps=500
  ... )

  Args:
    config: A recipe: the name of a shipped one, a path, or a ConfigDict.
    data: The data, instead of those of the recipe. An array, uint8 (N, H, W, C)
      or (N, H, W); or a mapping of `images` and `labels` (N,); or a
      `data.store.Source`. Its height, width and channels replace those of the
      recipe. A mapping of other keys sets keys of `config.data`. A run of an
      array keeps its hashes, not the array: pass it again to resume.
    workdir: The folder of the run.
    num_samples: Number of samples in the preview at the end.
    progress: Whether to show messages and a progress bar.
    **keys: Other values of keys, as in `get_config`.

  Returns:
    The run, with its newest weights.

  Raises:
    UserError: If the recipe, the data or the workdir are not valid.
    RunError: If the loss is not finite.
  """
  _check_float32()
  source = None
  if isinstance(data, Mapping) and 'images' not in data:
    keys['data'] = {**keys.get('data', {}), **data}
  elif data is not None:
    source = data if isinstance(data, store.Source) else _source(data)
    size, channels = _shape(source)
    keys['data'] = {
      'name': 'arrays',
      'path': '',
      **keys.get('data', {}),
      'image_size': size,
      'channels': channels,
    }
  folder = paths.path(os.fspath(workdir))
  with logs.shown(progress):
    made = get_config(config, **keys)
    found = recipe.resolve(made, folder, {}, recover=True)
    validate.check(found)
    return trainer.train(
      found,
      folder,
      source=source,
      num_samples=num_samples,
      from_python=True,
    )


def _source(data: Any) -> store.Source:
  """A source of an array, or of a mapping of images and labels."""
  given = data if isinstance(data, Mapping) else {'images': data}
  if others := set(given) - {'images', 'labels'}:
    raise errors.UserError(
      f'data has {", ".join(sorted(others))}: give images, and labels if there '
      'are any'
    )
  labels = given.get('labels')
  images, labels = arrayfile.checked(
    'data', np.asarray(given['images']), labels
  )
  return store.from_arrays(images, labels, image_folder.class_names(labels))


def _shape(source: store.Source) -> tuple[tuple[int, ...], int]:
  """(image_size, channels) of the examples of a source."""
  *size, channels = source.gather(np.arange(1))['image'].shape[1:]
  return tuple(size), channels
