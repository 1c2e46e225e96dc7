"""What is asked of the machine is given."""

import ast
import configparser
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import threading

import jax
import pytest

from ddpm_jax import errors
from ddpm_jax import machine
from ddpm_jax.storage import workdir

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import resource
import numpy as np

def faults_of_a_large_array():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(2**23)  # 64 MiB, freed at once
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults_of_a_large_array(), faults_of_a_large_array())
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != 'glibc', reason='a setting of glibc'
)
def test_memory_that_was_freed_is_not_taken_anew():
  """By a program that launch/cpu.sh starts."""
  out = subprocess.run(
    ['bash', 'launch/cpu.sh', sys.executable, '-c', PROGRAM],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  first, again = map(int, out.split())
  # 32 pages of 2 MiB, of which one may be there, or many more of 4 KiB.
  assert first >= 24
  assert again < 4


def test_as_many_files_are_open_as_may_be():
  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
    machine.open_many_files()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[1]
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
  'error',
  [
    AssertionError(),
    RuntimeError("Unable to initialize backend 'foo':\nit is unknown"),
  ],
)
def test_devices_that_are_not_here_are_a_line(error, monkeypatch):
  """JAX raises the one for cuda, the other for a name it does not know."""

  def devices():
    raise error

  monkeypatch.setattr(jax, 'devices', devices)
  with pytest.raises(errors.UserError) as caught:
    machine.look_for_devices()
  assert 'JAX_PLATFORMS=cpu' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_a_run_is_of_float32_whatever_jax_is_told():
  jax.config.update('jax_enable_x64', True)
  try:
    machine.start_jax()
    assert not jax.config.values['jax_enable_x64']
  finally:
    jax.config.update('jax_enable_x64', False)


def test_a_run_that_is_not_compiled_is_refused():
  with (
    jax.disable_jit(),
    pytest.raises(errors.UserError, match='JAX_DISABLE_JIT'),
  ):
    machine.start_jax()


def test_jax_that_cannot_be_imported_is_a_line():
  env = os.environ | {'JAX_ENABLE_X64': 'maybe', 'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-m', 'ddpm_jax.main', '--mode=compare']
  ended = subprocess.run(command, env=env, capture_output=True, text=True)
  assert ended.returncode == 2
  assert ended.stderr.startswith('error: JAX cannot be imported (ValueError')
  assert ended.stderr.count('\n') == 1


@pytest.mark.parametrize('home', ['', '/dev/null', '/proc'])
def test_a_home_that_cannot_be_written_keeps_no_cache(home, monkeypatch, capfd):
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setenv('HOME', home)
  if not home:  # nor an entry of this user in passwd
    monkeypatch.setattr('os.path.expanduser', lambda path: path)
  assert workdir.cache() is None
  jax.config.update('jax_compilation_cache_dir', None)
  try:
    machine.keep_compiled()
    assert not jax.config.values['jax_compilation_cache_dir']
  finally:
    jax.config.update(
      'jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR']
    )
  told = capfd.readouterr().err
  assert told.count('\n') == 1
  assert 'JAX_COMPILATION_CACHE_DIR' in told


@pytest.mark.parametrize(
  'backend', ['module://matplotlib_inline.backend_inline', 'nonsense']
)
def test_plots_are_of_no_backend_of_a_users(backend):
  program = """
import os, numpy as np
from ddpm_jax import plots
print(plots.render(plots.new_figure()).ndim, os.environ['MPLBACKEND'])
"""
  env = os.environ | {'MPLBACKEND': backend, 'PYTHONPATH': str(ROOT)}
  out = subprocess.run(
    [sys.executable, '-W', 'error', '-c', program],
    env={k: v for k, v in env.items() if k != 'HOME'},
    check=True,
    capture_output=True,
    text=True,
  )
  assert out.stdout == f'3 {backend}\n'
  assert out.stderr == ''


def test_no_assertion_does_what_is_needed():
  """`python -O` leaves them out."""
  for path in (ROOT / 'ddpm_jax').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Assert):
        calls = [x for x in ast.walk(node.test) if isinstance(x, ast.Call)]
        assert not calls, f'{path}:{node.lineno}'


def test_all_packages_and_the_recipes_are_installed():
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  named = setup['options']['packages'].split()
  folders = {
    '.'.join(path.parent.relative_to(ROOT).parts)
    for path in (ROOT / 'ddpm_jax').rglob('__init__.py')
  }
  assert set(named) == folders | {'ddpm_jax.configs'}
  mapped = setup['options']['package_dir'].split('=')
  assert [x.strip() for x in mapped] == ['ddpm_jax.configs', 'configs']


def test_without_a_home_nothing_is_cached(monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', 'nowhere')
  assert workdir.cache() is None


def test_damaged_notes_of_a_run_are_warned_of_and_begun_anew(tmp_path, caplog):
  (tmp_path / 'data.npz').write_bytes(b'x')
  (tmp_path / 'changes.json').write_text('{')
  assert workdir.read_data(tmp_path) is None
  workdir.add_change(tmp_path, {'step': 3})
  assert json.loads((tmp_path / 'changes.json').read_text()) == [{'step': 3}]
  damaged, anew = caplog.messages
  assert 'data.npz is damaged, not used' in damaged
  assert 'it is replaced' in anew


def test_a_recipe_that_another_process_writes_is_waited_for(tmp_path):
  timer = threading.Timer(
    0.3, workdir.write_config, (tmp_path, {'batch_size': 3})
  )
  timer.start()
  workdir.wait_for_config(tmp_path, {'batch_size': 3}, seconds=60)
  with pytest.raises(errors.UserError, match='on a disk that they share'):
    workdir.wait_for_config(tmp_path, {'batch_size': 4}, seconds=0)
