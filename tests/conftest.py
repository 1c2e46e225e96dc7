"""The suite runs on eight virtual CPU devices.

Most of its time is compilation, so the compiler optimises less; the programs
that `test_main.py` starts are compiled as a user's are.
"""

import os
import pathlib

import pytest

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'


@pytest.fixture(scope='session')
def user_env(tmp_path_factory):
  """The environment of a user with one device, for programs of their own.

  They share what they compile, so that the second to need it need not.
  """
  env = os.environ | {
    'JAX_NUM_CPU_DEVICES': '1',
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('cache')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'PYTHONPATH': str(pathlib.Path(__file__).parents[1]),
  }
  del env['XLA_FLAGS']
  return env
