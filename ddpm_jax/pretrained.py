"""Models in other formats: diffusers folders and .ckpt of pytorch_diffusion."""

import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import recipe
from ddpm_jax import validate
from ddpm_jax.data import pipeline
from ddpm_jax.interop import diffusers
from ddpm_jax.interop import fields
from ddpm_jax.interop import files
from ddpm_jax.parallel import meshes
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage import lock
from ddpm_jax.storage import logs
from ddpm_jax.storage import workdir

# Keys of a model that may be overridden: it can be trained or sampled without.
ADVICE = ('model.dropout', 'sampler.clip', 'loss.name')


class Pretrained(NamedTuple):
  """A model that another program trained.

  Attributes:
    config: The recipe, with the model's own keys.
    params: The weights.
    path: The file of the weights.
    size: Number of parameters.
  """

  config: ConfigDict
  params: Any
  path: pathlib.Path
  size: int


def read(
  name: str,
  spec: str | None = None,
  changes: Mapping[str, str] | None = None,
  *,
  values: Mapping[str, Any] | None = None,
) -> Pretrained:
  """Reads a model in another format.

  Args:
    name: A diffusers folder, its name on huggingface.co, or a .ckpt file.
    spec: The recipe; by default the shipped one of the nearest size. A .ckpt
      needs one.
    changes: {key: text} of the command line.
    values: {key: value} of Python.

  Raises:
    UserError: If the model cannot be read, or contradicts the recipe.
  """
  changes, values = dict(changes or {}), dict(values or {})
  path = files.locate(name)
  if path.is_dir():
    model = files.read_model(path)
    keys = fields.to_recipe(model.unet, model.scheduler)
    weights, names = model.weights, diffusers.DIFFUSERS
    rows = model.unet.get('num_class_embeds')
  else:
    if not spec:
      raise errors.UserError(
        f'{path} does not contain its recipe: name one, such as '
        '--config=configs/cifar.py'
      )
    keys, weights, names = {}, path, diffusers.PYTORCH_DIFFUSION
    rows = None
  said = changes | values
  config = _recipe(name, spec, changes, values, keys)
  if rows:
    _set_classes(config, name, said, rows)
  validate.check(config)
  validate.unread(config, said, said)
  if config.model.name != 'unet' or (config.condition.name and not rows):
    raise errors.UserError(
      f'{path} is a U-Net without a condition, which {spec} is not'
    )
  tensors = files.read_tensors(weights)
  _check_depth(config, len(tensors), weights)
  abstract = jax.eval_shape(functools.partial(build.init_state, config))
  params = diffusers.to_params(abstract.params, tensors, names)
  size = sum(math.prod(x.shape) for x in tensors.values())
  return Pretrained(config, params, weights, size)


def _recipe(
  name: str,
  spec: str | None,
  changes: dict[str, str],
  values: dict[str, Any],
  keys: dict[str, Any],
) -> ConfigDict:
  """The recipe `spec`, or that of the nearest size, with the model's keys.

  Raises:
    UserError: If `changes` or `values` contradict the model.
  """
  if spec:
    config = recipe.load(spec)
  else:
    like = (keys['data.image_size'], keys['data.channels'])
    nearest = {(32, 3): 'cifar', (256, 3): 'celebahq'}
    config = recipe.shipped(nearest.get(like, 'folder'))
    config.data.path = ''  # The model may be of any data.
  config.update_from_flattened_dict(keys)
  recipe.override(config, changes)
  recipe.set_keys(config, values)
  flat = recipe.flatten(config)
  for key, value in keys.items():
    if key not in ADVICE and flat[key] != value:
      raise errors.UserError(
        f'config.{key} is {value!r} in {name}: leave '
        f'--config.{key}={flat[key]} out'
      )
  return config


def _set_classes(
  config: ConfigDict, name: str, said: Mapping[str, Any], rows: int
) -> None:
  """Checks `condition.classes` against the rows of a class embedding.

  Raises:
    UserError: If it does not say whether the last row is a class.
  """
  classes = config.condition.classes
  if classes not in (rows - 1, rows):
    raise errors.UserError(
      f'{name} has num_class_embeds={rows}: set '
      f'--config.condition.classes={rows} if each is a class, or '
      f'={rows - 1} if the last one stands for no class, as in a model that '
      '--mode=convert wrote'
    )
  if classes == rows and 'condition.drop' not in said:
    config.condition.drop = 0.0
    logs.say(
      'the model was trained without "no class": condition.drop=0, and '
      'guidance is not for it'
    )


def _check_depth(config: ConfigDict, count: int, path: pathlib.Path) -> None:
  """Refuses a network of far more layers than a file has tensors.

  Building it would take time in proportion to its depth.

  Raises:
    UserError: Naming the key.
  """
  c = config.model
  blocks = len(c.multipliers) * (2 * c.blocks + 1)
  if 2 * blocks > count:  # A block has ten, or five if it is small.
    raise errors.UserError(
      f'{path} holds {count} tensors, too few for {blocks} blocks: '
      f'config.model.blocks={c.blocks} (layers_per_block) is of another network'
    )


def save_new(model: Pretrained, folder: pathlib.Path, source: str) -> None:
  """Writes a model as the new run `folder`, marked as imported from `source`.

  Raises:
    UserError: If there is a run, or it cannot be written.
  """
  workdir.check(folder)
  with lock.held(folder):
    workdir.mark_imported(folder, source)
    save(model.config, build.mesh(model.config), model.params, folder)


def save(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  params: Any,
  folder: pathlib.Path,
) -> None:
  """Writes a run at step 0. `config.json`, which makes it a run, comes last."""
  begin = functools.partial(build.begin, config)
  state = meshes.init_state(begin, mesh, params)
  checkpoints = checkpoint.open(folder / 'checkpoints')
  try:
    checkpoint.save(
      checkpoints,
      0,
      state=checkpoint.trained(state),
      ema=state.ema_params,
      data=pipeline.position(0),
      config=recipe.to_json(config),
    )
  finally:
    checkpoint.close(checkpoints)
  workdir.write_config(folder, recipe.to_json(config))
