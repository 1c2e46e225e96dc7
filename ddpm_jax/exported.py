"""Exports a run as a diffusers folder with a model card."""

import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax import validate
from ddpm_jax.evaluation import record
from ddpm_jax.evaluation import small_data
from ddpm_jax.interop import card
from ddpm_jax.interop import diffusers
from ddpm_jax.interop import fields
from ddpm_jax.interop import files
from ddpm_jax.storage import paths
from ddpm_jax.storage import workdir


def recipe_of(
  folder: pathlib.Path, spec: str | None, changes: dict[str, str]
) -> ConfigDict:
  """Returns the recipe of the run in `folder`, on the devices that are here.

  Args:
    folder: The workdir.
    spec: The value of --config; None for that of the run.
    changes: {key: text}, the overrides on the command line.

  Raises:
    UserError: If there is no run, or the recipe is not valid.
  """
  workdir.check_run(folder)
  config = recipe.resolve(spec, folder, changes)
  if not spec and not any(key.startswith('parallel') for key in changes):
    config = validate.fit_devices(config, trains=False)
  validate.check(config)
  return config


def write(
  config: ConfigDict,
  run: pathlib.Path,
  folder: pathlib.Path,
  *,
  name: str,
  license: str,
) -> str:
  """Writes the newest weights of a run as a diffusers folder.

  Args:
    config: The recipe.
    run: The workdir.
    folder: The new folder.
    name: USER/NAME of the model in its card; '' for the name of the folder.
    license: The license in its card.

  Returns:
    What was written, for a message.

  Raises:
    UserError: If diffusers has no such model, or the folder is not local.
  """
  if paths.is_remote(folder):
    raise errors.UserError(
      f'--output={folder}: safetensors writes only to this machine: name a '
      'local folder, and copy it'
    )
  keys = recipe.flatten(config)
  beta = np.asarray(build.schedule(config).beta[1:]).tolist()
  unet, scheduler = fields.from_recipe(keys, beta)
  mesh = build.mesh(config)
  workdir.create(folder)
  kind, step, params = runs.restore(config, mesh, run)
  tensors = diffusers.from_params(jax.device_get(params), diffusers.DIFFUSERS)
  rows = unet['num_class_embeds']
  if rows:
    tensors[diffusers.CLASSES] = tensors[diffusers.CLASSES][:rows]
  model = card.Model(
    name or folder.resolve().name,
    *(keys, step, kind),
    parameters=sum(x.size for x in tensors.values()),
    license=license,
  )
  card.write(folder, model, run, recipe.defaults(), scores_of(run))
  files.write_model(folder, unet, scheduler, tensors)
  return f'the {kind} weights of step {step}'


def scores_of(folder: pathlib.Path) -> card.Scores:
  """Returns what was measured of a run."""
  found = record.read(folder)
  return card.Scores(
    bounds=found.get(record.BOUNDS, []),
    of_samples=found.get(record.SCORES, []),
    small_data=small_data.read(folder),
  )
