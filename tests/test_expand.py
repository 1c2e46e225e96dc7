"""Paths as people write them."""

import pathlib

import pytest

from ddpm_jax import errors
from ddpm_jax import expand
from ddpm_jax import flags as command
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax.data import sources


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.setenv('SCRATCH', '/scratch')
  monkeypatch.delenv('NOWHERE', raising=False)
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'home').mkdir()
  return tmp_path / 'home'


def test_a_home_and_variables_are_replaced(home):
  for text, path in {
    '~': f'{home}',
    '~/run': f'{home}/run',
    '$HOME/run': f'{home}/run',
    '${SCRATCH}/a$SCRATCH': '/scratch/a/scratch',
    'runs/a~b': 'runs/a~b',
    'cost_5$.png': 'cost_5$.png',
    'cost_$5.png': 'cost_$5.png',
    'gs://bucket/run': 'gs://bucket/run',
    '': '',
  }.items():
    assert expand.expanded(text) == path


def test_what_is_there_by_the_very_name_is_meant(home):
  pathlib.Path('$SCRATCH').mkdir()
  assert expand.expanded('$SCRATCH') == '$SCRATCH'


@pytest.mark.parametrize(
  ('text', 'told'),
  [
    ('$NOWHERE/run', r'\$NOWHERE is not set'),
    ('${NOWHERE}/run', r'\$\{NOWHERE\} is not set'),
    ('~nobody_of_this_name/run', '~nobody_of_this_name is not known'),
    ('x' * 5000, 'File name too long'),
    ('a\0b', 'null'),
  ],
)
def test_what_cannot_be_a_path_is_said(text, told, home):
  with pytest.raises(errors.UserError, match=told) as caught:
    expand.expanded(text)
  assert len(str(caught.value)) < 200


def test_nobody_without_a_home_makes_a_folder_named_tilde(home, monkeypatch):
  monkeypatch.delenv('HOME')
  monkeypatch.setattr('os.path.expanduser', lambda path: path)
  with pytest.raises(
    errors.UserError, match='--workdir: ~/run: ~ is not known'
  ):
    main.run(['--workdir=~/run', '--config=configs/digits.py'])


@pytest.mark.parametrize('mode', command.modes())
def test_every_flag_that_is_a_path_is_expanded(mode, home):
  typed = [
    action.dest
    for action in command.parser(mode)._actions
    if action.type not in (None, int, float) and action.dest != 'license'
  ]
  assert 'workdir' in typed
  args = command.parse([f'--mode={mode}', *(f'--{x}=~/{x}' for x in typed)])
  for name in typed:
    assert str(getattr(args, name)) == f'{home}/{name}'


def test_so_are_the_paths_of_a_recipe(home):
  (home / 'mine.py').write_text('from configs.digits import get_config\n')
  assert recipe.load('~/mine.py').data.name == 'digits'
  given = {'path': '~/none', 'image_size': (8, 8), 'channels': 3}
  with pytest.raises(errors.UserError, match=f'{home}/none'):
    sources.folder(**given, max_unreadable=0)
  with pytest.raises(errors.UserError, match=f'{home}/none'):
    sources.arrays(**given)
