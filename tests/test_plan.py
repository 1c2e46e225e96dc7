"""A plan says what a run would be, without running it."""

import functools
import importlib.util
import json

import jax
import numpy as np
import pytest

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax.jobs import plan
from ddpm_jax.jobs.plan import advice
from ddpm_jax.jobs.plan import programs
from ddpm_jax.runtime import account
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime import target

TINY = [
  '--mode=plan',
  '--config=configs/digits.py',
  '--config.model.channels=8',
  '--config.model.multipliers=(1,)',
  '--config.model.groups=4',
  '--config.batch_size=32',
  '--config.sampler.steps=10',
  '--config.sampler.batch_size=32',
]
ONE, DATA, FSDP, ROWS = (
  ('--config.parallel.data=1',),
  ('--config.parallel.data=8',),
  ('--config.parallel.fsdp=8',),
  ('--config.parallel.data=1', '--config.parallel.spatial=8'),
)
PARAMS = 8 * 1024  # roughly


@pytest.fixture(scope='module')
def planned():
  """flags -> the object that is printed, which is all that is."""

  @functools.cache
  def of(*flags, topology='cpu:8'):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      main.run([*TINY, f'--topology={topology}', '--json', *flags])
    return json.loads(out.getvalue())

  return of
