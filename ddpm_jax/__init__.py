"""Denoising Diffusion Probabilistic Models (Ho et al. 2020) in JAX and Flax.

`load` opens a trained run, `train` trains one, and `diffusion` holds the pure
functions: schedules, losses, samplers and the bound.
"""

import importlib
import importlib.machinery
import importlib.util
import pathlib
import sys
from typing import TYPE_CHECKING
from typing import Any

from ddpm_jax.errors import RunError
from ddpm_jax.errors import UserError

__version__ = '0.1.0'  # setup.cfg reads it from here

# The package `ddpm_jax.configs`, the recipes. When installed it is a folder in
# this one, which Python finds; in a checkout it is the folder beside it.
if not (pathlib.Path(__file__).parent / 'configs').is_dir():
  _spec = importlib.machinery.ModuleSpec(
    'ddpm_jax.configs', loader=None, is_package=True
  )
  _spec.submodule_search_locations = [
    str(pathlib.Path(__file__).parents[1] / 'configs')
  ]
  configs = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)

if TYPE_CHECKING:
  from ddpm_jax import diffusion
  from ddpm_jax import models
  from ddpm_jax.api import get_config
  from ddpm_jax.api import load
  from ddpm_jax.api import train
  from ddpm_jax.run import Run

__all__ = [
  'Run',
  'RunError',
  'UserError',
  'diffusion',
  'get_config',
  'load',
  'models',
  'train',
]

# Imported when they are first used: JAX takes seconds.
_LAZY = {
  'Run': 'run',
  'get_config': 'api',
  'load': 'api',
  'train': 'api',
}


def __getattr__(name: str) -> Any:
  if name in _LAZY:
    return getattr(importlib.import_module(f'ddpm_jax.{_LAZY[name]}'), name)
  if name in __all__:
    return importlib.import_module(f'ddpm_jax.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
