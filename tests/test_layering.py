"""Imports point downwards only."""

import ast
import inspect
import pathlib
import re

import pytest

from configs import base
from ddpm_jax import recipe
from ddpm_jax import validate

ROOT = pathlib.Path(__file__).parents[1] / 'ddpm_jax'

# Each may import what comes after it, and nothing beside it.
LAYERS = [
  ['main'],
  ['jobs'],
  ['flags'],
  ['validate'],
  ['dataset', 'sampling'],
  ['build'],
  ['recipe'],
  ['interop'],
  ['diffusion', 'models', 'data', 'metrics', 'runtime'],
  ['imagefile', 'jsonfile', 'npz'],
  ['regular'],
  ['expand', 'ranges'],
  ['errors'],
]
INSIDE = {  # Rooms whose files have an order of their own.
  'diffusion': [
    [
      'codec',
      'editing',
      'guidance',
      'losses',
      'two_term',
    ],
    ['likelihood', 'samplers'],
    ['denoiser'],
    ['process'],
    ['predictions', 'variances'],
    ['schedules', 'training'],
    ['pixels', 'shapes', 'spacings', 'timesteps'],
  ],
  'runtime': [
    ['outputs', 'profile', 'results', 'timing'],
    [
      'bitstream',
      'checkpoint',
      'images',
      'machine',
      'parallel',
      'stop',
      'target',
    ],
    ['lock', 'workdir'],
    ['logs'],
    ['paths'],
    ['account', 'arithmetic', 'bucket'],
    ['fingerprint', 'processes'],
    ['streams'],
  ],
  'metrics': [
    ['fidelity', 'small', 'weights'],
    ['running'],
    ['classifier', 'distances', 'inception'],
  ],
  'models': [
    ['networks'],
    ['condition', 'mlp', 'unet'],
    ['layers'],
    ['convolution'],
  ],
}
FILES = sorted(ROOT.rglob('*.py'))


def imported(path):
  """The modules of ours that a file imports, without the first `ddpm_jax`."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    elif isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    else:
      continue
    for name in names:
      if name.startswith('ddpm_jax.'):
        yield name.removeprefix('ddpm_jax.').split('.')


def depth(layers, name):
  found = [i for i, layer in enumerate(layers) if name in layer]
  assert found, f'{name} has no place in {layers}'
  return found[0]


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
  here = path.relative_to(ROOT).with_suffix('').parts
  if here == ('__init__',):
    return
  for there in imported(path):
    if there[0] == here[0]:
      if here[0] in INSIDE and len(here) > 1 and here[1] != '__init__':
        inside = INSIDE[here[0]]
        assert depth(inside, there[1]) > depth(inside, here[1]), there
    else:
      assert depth(LAYERS, there[0]) > depth(LAYERS, here[0]), there


@pytest.mark.parametrize('room', ['diffusion', 'models'])
def test_mathematics_knows_no_devices_and_no_files(room):
  banned = ('jit', 'pmap', 'device_put', 'Mesh', 'NamedSharding', 'open')
  files = [path for path in FILES if path.parent == ROOT / room]
  assert len(files) > 1  # more than __init__.py
  for path in files:
    for node in ast.walk(ast.parse(path.read_text())):
      name = getattr(node, 'attr', getattr(node, 'id', None))
      assert name not in banned, f'{path.name}:{node.lineno} uses {name}'


def test_only_those_who_build_and_jobs_see_a_ConfigDict():
  seen = {
    path.relative_to(ROOT).parts[0]
    for path in FILES
    if 'ConfigDict' in path.read_text()
  }
  assert seen == {
    *('jobs', 'build.py', 'dataset.py', 'sampling.py', 'validate.py'),
    'recipe.py',
  }


def test_the_program_does_not_check_shapes_as_it_runs():
  for path in FILES:
    assert not {'beartype', 'jaxtyped', 'install_import_hook'} & set(
      re.findall(r'\w+', path.read_text())
    ), path


def test_no_private_imports():
  for path in FILES:
    text = path.read_text()
    assert '._src' not in text, path
    assert 'import *' not in text, path


def config_path(node, names):
  """('optimizer', 'clip') of `config.optimizer.clip`; None of other nodes.

  `names` are the variables that stand for a section.
  """
  if isinstance(node, ast.Name):
    return () if node.id == 'config' else names.get(node.id)
  if isinstance(node, ast.Attribute):
    if node.attr == 'config':  # such as `self.config`
      return ()
    path = config_path(node.value, names)
    return None if path is None else (*path, node.attr)
  return None


def keys_read(function):
  """The keys of the recipe that a function reads as attributes."""
  names = {}
  for node in ast.walk(function):
    if isinstance(node, ast.Assign):
      target, value = node.targets[0], node.value
      both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
      targets = target.elts if both else [target]
      values = value.elts if both else [value]
      for name, section in zip(targets, values, strict=False):
        if isinstance(name, ast.Name) and config_path(section, names):
          names[name.id] = config_path(section, names)
  for node in ast.walk(function):
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
      yield '.'.join(config_path(node, names) or ())


def keys_passed():
  """The keys that the functions which a recipe names take as arguments."""
  for section, (module, _, given) in validate.MEMBERS.items():
    for name in module.__all__:
      names = inspect.signature(getattr(module, name)).parameters
      yield from (f'{section}.{key}' for key in list(names)[given:])


def test_every_key_of_the_base_recipe_is_read():
  """A key that nothing reads would promise what is not there."""
  read = set(keys_passed())
  for path in FILES:
    if path.name != 'validate.py':  # What is only checked changes nothing.
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
          read |= set(keys_read(node))
  unread = ['name', 'optimizer.name', 'optimizer.steps', 'log.path']
  keys = [*recipe.flatten(base.get_config()), *unread]
  assert [key for key in keys if key not in read] == unread
