"""An install that is not editable has all that the program needs."""

import email
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# What pyproject.toml asks for; the extra `test` has it.
pytest.importorskip('setuptools', minversion='77')


def pip(*args):
  subprocess.run(
    [sys.executable, '-m', 'pip', *args, '--no-deps', '--quiet'],
    env=os.environ | {'PIP_DISABLE_PIP_VERSION_CHECK': '1'},
    check=True,
  )


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """Built of a copy, for a build writes into the tree."""
  tree = tmp_path_factory.mktemp('tree')
  for name in ('ddpm_jax', 'configs'):
    shutil.copytree(
      ROOT / name,
      tree / name,
      ignore=shutil.ignore_patterns('__pycache__'),
    )
  for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, tree)
  folder = tmp_path_factory.mktemp('wheel')
  pip('wheel', '--no-build-isolation', f'--wheel-dir={folder}', tree)
  [path] = folder.iterdir()
  return path


def test_a_wheel_has_every_module_every_recipe_and_the_license(wheel):
  ours = [*ROOT.glob('ddpm_jax/**/*.py'), ROOT / 'ddpm_jax' / 'py.typed']
  wanted = {path.relative_to(ROOT).as_posix() for path in ours}
  wanted |= {f'ddpm_jax/configs/{p.name}' for p in ROOT.glob('configs/*.py')}
  with zipfile.ZipFile(wheel) as file:
    names = file.namelist()
    about = {x for x in names if x.startswith('ddpm_jax-')}
    assert set(names) - about == wanted
    [license] = (x for x in about if x.endswith('/LICENSE'))
    assert file.read(license) == (ROOT / 'LICENSE').read_bytes()
    [metadata] = (x for x in about if x.endswith('/METADATA'))
    fields = email.message_from_bytes(file.read(metadata))
  # setuptools writes the one or the other.
  licenses = fields['License'], fields['License-Expression']
  assert 'Apache-2.0' in licenses
  assert fields['Requires-Python'] == '>=3.11'
  assert 'jax>=0.10' in fields.get_all('Requires-Dist')


def test_what_is_installed_runs_from_anywhere_and_finds_its_recipes(
  wheel, tmp_path
):
  place, elsewhere = tmp_path / 'place', tmp_path / 'elsewhere'
  elsewhere.mkdir()
  pip('install', '--no-index', f'--target={place}', wheel)

  def python(*args):
    return subprocess.run(
      [sys.executable, *args],
      env=os.environ | {'PYTHONPATH': str(place)},
      cwd=elsewhere,
      capture_output=True,
      text=True,
    )

  said = python('-m', 'ddpm_jax.main', '--help')
  assert said.returncode == 0, said.stderr
  assert '--workdir' in said.stdout
  program = 'import ddpm_jax; from ddpm_jax import recipe; '
  program += "c = recipe.load('configs/digits.py'); "
  program += 'print(ddpm_jax.__file__, recipe.CONFIGS, c.data.name)'
  said = python('-c', program)
  inside = place / 'ddpm_jax'
  assert said.stdout.split() == [
    f'{inside / "__init__.py"}',
    f'{inside / "configs"}',
    'digits',
  ], said.stderr
