"""Reads and writes the folders and weight files of other programs."""

import json
import pathlib
import pickle
import re
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import numpy as np
from safetensors import numpy as safetensors_numpy

from ddpm_jax import errors
from ddpm_jax import jsonfile

LIMIT = 2**20  # bytes of a configuration, which normally has a few hundred
WEIGHTS = 'diffusion_pytorch_model'
UNET = ('unet/config.json', 'config.json')
SCHEDULER = ('scheduler/scheduler_config.json', 'scheduler_config.json')
SAFE = (f'unet/{WEIGHTS}.safetensors', f'{WEIGHTS}.safetensors')
PICKLED = (f'unet/{WEIGHTS}.bin', f'{WEIGHTS}.bin')


class Model(NamedTuple):
  unet: dict[str, Any]  # the fields of UNet2DModel
  scheduler: dict[str, Any]  # the fields of DDPMScheduler
  weights: pathlib.Path


def locate(name: str) -> pathlib.Path:
  """Returns the path of a folder or file, or downloads a model of the hub.

  Raises:
    UserError: If there is neither.
  """
  path = pathlib.Path(name)
  if path.exists():
    return path
  if not re.fullmatch(r'[\w.-]+/[\w.-]+', name):
    raise errors.UserError(f'no such folder or file: {name}')
  huggingface_hub = errors.optional(
    'huggingface_hub',
    what=f'no such folder: {name}; downloading it from huggingface.co',
    install="pip install -e '.[hub]'",
  )
  try:
    # Fetches the pickle, half a gigabyte, only if there is no .safetensors.
    for weights in (SAFE, PICKLED):
      folder = huggingface_hub.snapshot_download(
        name, allow_patterns=[*UNET, *SCHEDULER, *weights]
      )
      if any((pathlib.Path(folder) / file).exists() for file in weights):
        break
    return pathlib.Path(folder)
  except Exception as e:  # no network, no such model, or no permission
    reason = ' '.join(str(e).split())
    raise errors.UserError(
      f'no such folder, and downloading it from huggingface.co failed: {name} '
      f'({type(e).__name__}: {reason:.200})'
    ) from e


def read_model(folder: pathlib.Path) -> Model:
  """Reads a folder written by diffusers.

  Raises:
    UserError: If a file is missing or damaged.
  """
  return Model(
    unet=read_json(_one_of(folder, UNET)),
    scheduler=read_json(_one_of(folder, SCHEDULER)),
    weights=_one_of(folder, (*SAFE, *PICKLED)),
  )


def _one_of(folder: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path:
  for name in names:
    if (folder / name).is_file():
      return folder / name
  raise errors.UserError(
    f'{folder} is not a diffusers folder: it has no {" or ".join(names)}'
  )


def read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    fields = jsonfile.read(path, limit=LIMIT)
  except OSError as e:
    raise errors.UserError(f'{path}: {e.strerror}') from None
  if not isinstance(fields, dict):
    raise errors.UserError(f'{path} is damaged: it is not a JSON object')
  return fields


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads the tensors of a .safetensors or a pickle (.bin, .ckpt, .pt).

  A pickle may run code when it is loaded. Only torch can load it without.

  Raises:
    UserError: If the file cannot be read safely.
  """
  if path.suffix == '.safetensors':
    try:
      return safetensors_numpy.load_file(path)
    except Exception as e:  # an error of safetensors or NumPy
      reason = errors.short(str(e), 200)
      raise errors.UserError(f'{path} cannot be read: {reason}') from None
  torch = errors.optional(
    'torch',
    what=f'{path} is a pickle, which could run code; reading it safely',
    install='pip install torch, or use a .safetensors file',
  )
  try:
    found = torch.load(path, map_location='cpu', weights_only=True)
    return {name: x.float().numpy() for name, x in found.items()}
  except (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError),
    *(AttributeError, ValueError),  # not a dict of tensors
  ) as e:
    reason = str(e).strip().partition('\n')[0]
    raise errors.UserError(
      f'{path} does not contain only weights: {reason:.200}'
    ) from None


def write_model(
  folder: pathlib.Path,
  unet: Mapping[str, Any],
  scheduler: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
) -> None:
  """Writes a folder for `DDPMPipeline.from_pretrained`, its index last."""
  (folder / 'unet').mkdir(parents=True)
  (folder / 'scheduler').mkdir()
  safetensors_numpy.save_file(
    dict(tensors),
    folder / SAFE[0],
    metadata={'format': 'pt'},  # required by diffusers
  )
  write_json(folder / UNET[0], unet)
  write_json(folder / SCHEDULER[0], scheduler)
  index = {
    '_class_name': 'DDPMPipeline',
    'scheduler': ['diffusers', 'DDPMScheduler'],
    'unet': ['diffusers', 'UNet2DModel'],
  }
  write_json(folder / 'model_index.json', index)


def write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(fields, indent=2, sort_keys=True) + '\n')
