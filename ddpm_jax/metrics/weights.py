"""Inception's weights, read from a file that the user provides."""

import hashlib
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from ddpm_jax import errors
from ddpm_jax.metrics import inception

NAME = 'pt_inception-2015-12-05-6726825d.pth'
URL = (
  'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
  + NAME
)
# A .pth is a pickle; only torch can read it without running code in it.
CONVERT = (
  "python -c 'import torch, safetensors.torch as s; "
  f's.save_file(torch.load("{NAME}", weights_only=True), '
  '"inception.safetensors")\''
)


class Weights(NamedTuple):
  params: Any  # of `inception.Inception`
  digest: str  # of the numbers, the same for both kinds of file


def missing() -> errors.UserError:
  return errors.UserError(
    'FID and the like need the weights of Inception-v3, which we do not ship: '
    f'download {URL} (96 MB), and set --inception={NAME}; without torch, '
    f'convert it elsewhere by {CONVERT}, and set '
    '--inception=inception.safetensors'
  )


def load(path: pathlib.Path) -> Weights:
  """Loads the weights of pytorch-fid's network from a .safetensors or .pth.

  Raises:
    UserError: If there is no such file, it cannot be read, or it is for another
      network.
  """
  if not path.is_file():
    raise errors.UserError(
      f'--inception={path} is not a file; download it from {URL}'
    )
  read = _safetensors if path.suffix == '.safetensors' else _pth
  try:
    state = read(path)
  except errors.UserError:
    raise
  except Exception as error:  # from torch or safetensors
    raise errors.UserError(
      f'{path} cannot be read ({" ".join(str(error).split())[:200]}); name '
      f'{NAME}, or a .safetensors made from it'
    ) from error
  try:
    params = inception.from_torch(state)
  except ValueError as error:
    raise errors.UserError(
      f'{path} is not of the 2015 Inception network ({error}); download {URL}'
    ) from None
  return Weights(params, digest(state))


def digest(state: dict[str, np.ndarray]) -> str:
  """Hash of the weights, sixteen hexadecimal digits."""
  total = hashlib.sha256()
  for name in sorted(state):
    if not name.endswith('.num_batches_tracked'):
      total.update(name.encode())
      total.update(np.asarray(state[name], '<f4').tobytes())
  return total.hexdigest()[:16]


def _safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  return safetensors.numpy.load_file(path)


def _pth(path: pathlib.Path) -> dict[str, np.ndarray]:
  torch = errors.optional(
    'torch',
    what=f'{path} is a pickle; reading it',
    install=f'pip install torch, or run {CONVERT} where it is installed, and '
    'name the resulting inception.safetensors',
  )
  state = torch.load(path, map_location='cpu', weights_only=True)
  return {name: x.numpy() for name, x in state.items()}
