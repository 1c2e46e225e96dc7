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

# Each may import what comes after it, and nothing beside it. A name is a file
# or a room; `room.file` is a file that has another place than its room.
LAYERS = [
  ['main'],
  ['jobs'],
  ['exported', 'study'],
  ['evaluation', 'planning', 'compression'],
  ['api'],
  ['trainer'],
  ['edits', 'pretrained', 'previews', 'samples'],
  ['inputs'],
  ['run'],
  ['drawing'],
  ['dataset', 'sampling', 'validate'],
  ['build'],
  ['flags', 'plots', 'recipe'],
  ['machine'],
  ['interop'],
  ['diffusion', 'models', 'data', 'metrics'],
  ['storage.outputs', 'storage.results'],
  ['storage.checkpoint', 'storage.images', 'parallel'],
  ['storage.lock', 'storage.metrics_log', 'storage.workdir'],
  ['storage.boards'],
  ['storage.logs'],
  ['storage.paths'],
  ['storage.bucket'],
  ['storage.fingerprint', 'parallel.processes'],
  ['streams'],
  ['imagefile', 'jsonfile', 'npz'],
  ['regular'],
  ['expand', 'ranges'],
  ['errors'],
]
# What the core never imports.
BEYOND = ('study', 'evaluation', 'planning', 'compression', 'interop')
CORE = (
  *('trainer', 'run', 'dataset', 'sampling', 'build', 'recipe', 'diffusion'),
  *('models', 'data', 'parallel', 'storage'),
)
INSIDE = {  # Rooms whose files have an order of their own.
  'diffusion': [
    ['editing', 'guidance', 'losses'],
    ['likelihood', 'samplers'],
    ['denoiser'],
    ['process'],
    ['predictions', 'variances'],
    ['schedules', 'training'],
    ['pixels', 'shapes', 'spacings', 'timesteps'],
  ],
  'compression': [
    ['compressed'],
    ['transmission'],
    ['codec', 'file_format'],
    ['range_coder'],
  ],
  'metrics': [
    ['fidelity', 'classifier_score', 'weights'],
    ['running'],
    ['classifier', 'distances', 'inception'],
  ],
  'models': [
    ['networks'],
    ['condition', 'mlp', 'unet'],
    ['layers'],
    ['winograd'],
    ['precision'],
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


def depth(layers, *names):
  """The layer of the first of the names that has one."""
  for name in names:
    for i, layer in enumerate(layers):
      if name in layer:
        return i
  raise AssertionError(f'{names} has no place in {layers}')


def place(parts):
  return depth(LAYERS, '.'.join(parts[:2]), parts[0])


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
  here = path.relative_to(ROOT).with_suffix('').parts
  if here[-1] == '__init__':
    return
  for there in imported(path):
    if here[0] in INSIDE and there[0] == here[0]:
      inside = INSIDE[here[0]]
      assert depth(inside, there[1]) > depth(inside, here[1]), there
    elif there[0] != here[0] or place(there) != place(here):
      assert place(there) > place(here), there
    if here[0] in CORE:
      # minilm, a frozen encoder of texts, is of other people's weights.
      assert there[0] not in BEYOND or there == ['interop', 'minilm'], there


def test_no_job_is_imported():
  for path in FILES:
    assert not [x for x in imported(path) if x[0] == 'jobs'], path


def test_only_plots_import_matplotlib():
  using = {
    p.name
    for p in FILES
    if re.search(r'import matplotlib|from matplotlib', p.read_text())
  }
  assert using == {'plots.py'}


@pytest.mark.parametrize('room', ['diffusion', 'models'])
def test_mathematics_knows_no_devices_and_no_files(room):
  banned = ('jit', 'pmap', 'device_put', 'Mesh', 'NamedSharding', 'open')
  files = [path for path in FILES if path.parent == ROOT / room]
  assert len(files) > 1  # more than __init__.py
  for path in files:
    for node in ast.walk(ast.parse(path.read_text())):
      name = getattr(node, 'attr', getattr(node, 'id', None))
      assert name not in banned, f'{path.name}:{node.lineno} uses {name}'


def test_recipes_are_not_seen_in_the_rooms_below_build():
  rooms = {
    path.relative_to(ROOT).parts[0]
    for path in FILES
    if path.parent != ROOT and 'ConfigDict' in path.read_text()
  }
  assert rooms == {'jobs', 'study', 'evaluation', 'planning', 'compression'}


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
