"""Denoising Diffusion Probabilistic Models (Ho et al. 2020) in JAX and Flax."""

import importlib.machinery
import importlib.util
import pathlib
import sys

__version__ = '0.1.0'  # setup.cfg reads it from here

# `ddpm_jax.configs`, the recipes, which lie beside this package in a checkout,
# and in it where it was installed.
if not (pathlib.Path(__file__).parent / 'configs').is_dir():
  _spec = importlib.machinery.ModuleSpec(
    'ddpm_jax.configs', loader=None, is_package=True
  )
  _spec.submodule_search_locations = [
    str(pathlib.Path(__file__).parents[1] / 'configs')
  ]
  configs = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
