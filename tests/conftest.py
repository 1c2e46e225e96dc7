"""The suite runs on eight virtual CPU devices.

Most of its time is compilation, so the compiler optimises less; the programs
that `test_main.py` starts are compiled as a user's are.
"""

import os
import pathlib
import subprocess
import sys

import jaxtyping
import pytest

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'
# What one test has compiled no other need compile, in this run or the next; and
# the cache of whoever runs the suite is left alone.
ROOT = pathlib.Path(__file__).parents[1]
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(ROOT / '.pytest_cache' / 'xla')
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
# A broadcast that adds an axis, (B,) with (B, D), is written out.
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
# Every call is held to the shapes in the signature. The option that jaxtyping
# gives pytest cannot say that an int will do for a float, as in mypy.
jaxtyping.install_import_hook(
  ['ddpm_jax.diffusion', 'ddpm_jax.models'],
  'beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))',
)

DIGITS = str(ROOT / 'configs' / 'digits.py')
TINY = [
  f'--config={DIGITS}',
  '--config.model.channels=8',
  '--config.model.multipliers=(1,)',
  '--config.model.groups=4',
  '--config.model.dropout=0.1',
  '--config.data.flip=true',
  '--config.batch_size=16',
  '--config.optimizer.warmup=5',
  '--config.sampler.steps=10',
  '--config.log.every=1',
  '--config.checkpoint.every=40',
  '--num_samples=9',
]


@pytest.fixture(scope='session')
def user_env(tmp_path_factory):
  """The environment of a user with one device, for programs of their own.

  They share what they compile, so that the second to need it need not.
  """
  env = os.environ | {
    'JAX_NUM_CPU_DEVICES': '1',
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('cache')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'PYTHONPATH': str(ROOT),
  }
  del env['XLA_FLAGS']
  return env


@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory, user_env):
  """A run of 200 steps that nothing happened to: (workdir, stderr).

  Nor does it, or a library that it uses, warn of anything.
  """
  workdir = tmp_path_factory.mktemp('runs') / 'undisturbed'
  process = subprocess.run(
    [
      *(sys.executable, '-m', 'ddpm_jax.main', *TINY),
      *('--config.steps=200', f'--workdir={workdir}'),
    ],
    env=user_env | {'PYTHONWARNINGS': 'error'},
    capture_output=True,
    text=True,
    check=True,
  )
  return workdir, process.stderr
