"""What is released has all that the program needs, where no checkout is."""

import configparser
import email
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import yaml

import ddpm_jax

ROOT = pathlib.Path(__file__).parents[1]
# What pyproject.toml asks for; the extra `test` has it.
pytest.importorskip('setuptools', minversion='77')


def call(*command, cwd=None, **env):
  done = subprocess.run(
    [sys.executable, *map(str, command)],
    env=os.environ | {'PIP_DISABLE_PIP_VERSION_CHECK': '1'} | env,
    cwd=cwd,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def pip(*args):
  call('-m', 'pip', *args, '--no-deps', '--quiet')


@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
  """Built of a copy, for a build writes into the tree."""
  tree = tmp_path_factory.mktemp('tree')
  for path in ROOT.iterdir():
    if path.is_file():
      shutil.copy(path, tree)
  for path in kept():
    (tree / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / path, tree / path)
  folder = tmp_path_factory.mktemp('sdist')
  program = 'import sys; from setuptools import build_meta; '
  program += 'build_meta.build_sdist(sys.argv[1])'
  call('-c', program, folder, cwd=tree)
  [path] = folder.iterdir()
  return path


@pytest.fixture(scope='module')
def wheel(sdist, tmp_path_factory):
  folder = tmp_path_factory.mktemp('wheel')
  pip('wheel', '--no-build-isolation', f'--wheel-dir={folder}', sdist)
  [path] = folder.iterdir()
  return path


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
  """The folder that the wheel was unpacked into."""
  place = tmp_path_factory.mktemp('place')
  pip('install', '--no-index', f'--target={place}', wheel)
  return place


@pytest.fixture(scope='module')
def metadata(wheel):
  with zipfile.ZipFile(wheel) as file:
    [name] = (x for x in file.namelist() if x.endswith('/METADATA'))
    return email.message_from_bytes(file.read(name))


def kept():
  """The files that are kept in git, from the root."""
  listed = ['git', 'ls-files', '--cached', '--others', '--exclude-standard']
  done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
  if done.returncode:
    pytest.skip('no git here')
  names = [x for x in done.stdout.splitlines() if (ROOT / x).is_file()]
  assert 'setup.cfg' in names
  return names


def test_the_source_distribution_has_all_that_is_in_git(sdist):
  with tarfile.open(sdist) as file:
    names = {name.partition('/')[2] for name in file.getnames()}
  missing = {*kept()} - names
  assert missing <= {'.gitignore'}


def test_a_wheel_has_every_module_every_recipe_and_the_license(wheel, metadata):
  ours = [*ROOT.glob('ddpm_jax/**/*.py'), ROOT / 'ddpm_jax' / 'py.typed']
  wanted = {path.relative_to(ROOT).as_posix() for path in ours}
  wanted |= {f'ddpm_jax/configs/{p.name}' for p in ROOT.glob('configs/*.py')}
  with zipfile.ZipFile(wheel) as file:
    names = file.namelist()
    about = {x for x in names if x.startswith('ddpm_jax-')}
    assert set(names) - about == wanted
    [license] = (x for x in about if x.endswith('/LICENSE'))
    assert file.read(license) == (ROOT / 'LICENSE').read_bytes()
    [top] = (x for x in about if x.endswith('/top_level.txt'))
    assert file.read(top).split() == [b'ddpm_jax']
  # setuptools writes the one or the other.
  licenses = metadata['License'], metadata['License-Expression']
  assert 'Apache-2.0' in licenses
  assert metadata['Requires-Python'] == '>=3.11'
  assert 'jax>=0.10' in metadata.get_all('Requires-Dist')


def test_its_description_needs_no_checkout(metadata):
  text = metadata.get_payload()
  assert metadata['Description-Content-Type'] == 'text/markdown'
  assert text.lstrip().startswith('# ddpm_jax')
  assert len(text) > 1000
  code = r'(?ms)^```.*?^```$|`[^`\n]*`'
  prose = re.sub(code, '', text)
  places = re.findall(r'\]\(([^)]*)\)', prose)  # [words](place)
  places += re.findall(r'(?m)^\[[^]]+\]: *(\S+)', prose)  # [words]: place
  places += re.findall(r'(?:src|href) *= *"?([^">\s]+)', prose)  # HTML
  assert places
  assert [x for x in places if not x.startswith('https://')] == []


def test_one_version_is_said_everywhere(metadata):
  version = ddpm_jax.__version__
  assert metadata['Version'] == version
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  assert citation['version'] == version
  assert version in (ROOT / 'CHANGELOG.md').read_text()


def test_the_command_runs_anywhere_and_finds_what_a_user_has(
  installed, tmp_path
):
  """As the script that pip makes: Python does not look here by itself."""
  place = str(installed)
  script = installed / 'bin' / 'ddpm-jax'

  def command(*args, cwd):
    return call(script, *args, cwd=cwd, PYTHONPATH=place)

  said = command('--version', cwd=tmp_path)
  assert said == f'ddpm_jax {ddpm_jax.__version__}\n'
  assert '--workdir' in command('--help', cwd=tmp_path)
  shutil.copytree(ROOT / 'tests' / 'own_folder', tmp_path / 'own')
  command('--config=configs/mine.py', '--workdir=run', cwd=tmp_path / 'own')
  assert (tmp_path / 'own' / 'run' / 'samples.png').is_file()


@pytest.mark.parametrize('where', ['installed', 'checkout'])
def test_our_recipes_are_found_and_so_is_a_package_of_their_name(
  where, request, tmp_path
):
  shutil.copytree(ROOT / 'tests' / 'own_folder', tmp_path / 'own')
  program = """\
import ddpm_jax
from ddpm_jax import recipe
print(recipe.load('configs/digits.py').data.name)
print(recipe.load('configs/mine.py').steps)
import configs.helpers
print(configs.helpers.STEPS, configs.__file__)
from ddpm_jax.configs import base, lsun
print(lsun.get_config('church').data.image_size, base.__file__)
"""
  root = ROOT
  inside = ROOT / 'configs'
  if where == 'installed':
    root = request.getfixturevalue('installed')
    inside = root / 'ddpm_jax' / 'configs'
  own = tmp_path / 'own'
  said = call('-c', program, cwd=own, PYTHONPATH=str(root))
  assert said.splitlines() == [
    'digits',
    '2',
    f'2 {own / "configs" / "__init__.py"}',
    f'256 {inside / "base.py"}',
  ]


@pytest.mark.parametrize('name', ['cpu', 'cuda'])
def test_an_image_is_built_of_what_a_build_reads(name, tmp_path, sdist):
  lines = (ROOT / 'launch' / f'{name}.Dockerfile').read_text().splitlines()
  assert lines[0].startswith(
    f'# docker build --file=launch/{name}.Dockerfile --tag='
  )
  for line in lines:
    if line.startswith('COPY '):
      *sources, target = shlex.split(line)[1:]
      for source in sources:
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / target)
  program = 'import sys; from setuptools import build_meta; '
  program += 'print(build_meta.prepare_metadata_for_build_wheel(sys.argv[1]))'
  call('-c', program, tmp_path, cwd=tmp_path)
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  [asked] = re.findall(r"'\.\[(.*?)\]'", '\n'.join(lines))
  assert {*asked.split(',')} <= {*setup['options.extras_require']}
