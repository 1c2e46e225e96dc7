"""A run goes on: with data that moved, with files that are damaged."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import dataset
from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax.data import contents
from ddpm_jax.data import image_folder
from ddpm_jax.data import sources
from ddpm_jax.data import store
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage import lock

# Holds the lock of a workdir until it is killed.
HOLDS = """
import pathlib, sys, time
from ddpm_jax.storage import lock
with lock.held(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(600)
"""
FOLDER = pathlib.Path(__file__).parents[1] / 'configs' / 'folder.py'
COMMON = [
  '--config.log.every=1',
  '--config.model.name=two_convolutions.network',
  *('--config.data.image_size=8', '--config.batch_size=2'),
  *('--config.sampler.steps=2', '--config.checkpoint.every=2'),
  *('--num_samples=2', '--config.parallel.data=1'),
]


BEGIN = [f'--config={FOLDER}', '--config.data.path=images', '--workdir=run']


def pictures(folder, *names):
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    number = int(''.join(c for c in name if c.isdigit()))
    image = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(image).save(folder / name)


@pytest.fixture(scope='module')
def run_of_two_steps(tmp_path_factory):
  """On four images; the path of the data is relative."""
  folder = tmp_path_factory.mktemp('trained')
  pictures(folder / 'images', *(f'{i}.png' for i in range(4)))
  with contextlib.chdir(folder):
    main.run([*BEGIN, '--config.steps=2', *COMMON])
  return folder


@pytest.fixture
def trained(run_of_two_steps, tmp_path, monkeypatch):
  """A copy of it, where we are."""
  monkeypatch.chdir(tmp_path)
  shutil.copytree(run_of_two_steps, tmp_path, dirs_exist_ok=True)
  return tmp_path


@pytest.fixture
def at_once(stop_at):
  """Runs go on, and stop before the next step: nothing is compiled."""
  stop_at(0)


def go_on(*flags):
  main.run(['--workdir=run', '--config.steps=4', *COMMON[-2:], *flags])


def steps(folder):
  lines = (folder / 'run' / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line)['step'] for line in lines]


def test_data_that_moved_are_named_and_the_run_goes_on(trained):
  (trained / 'images').rename(trained / 'elsewhere')
  with pytest.raises(errors.UserError, match=r'set --config\.data\.path'):
    go_on()
  go_on('--config.data.path=elsewhere')
  assert steps(trained) == [1, 2, 3, 4]
  assert json.loads((trained / 'run' / 'config.json').read_text())['steps'] == 4
  assert not (trained / 'run' / 'changes.json').exists()


def test_changed_data_are_counted_and_refused_but_on_purpose(trained, at_once):
  config = (trained / 'run' / 'config.json').read_bytes()
  pictures(trained / 'images', '7.png', '8.png')
  (trained / 'images' / '0.png').unlink()
  shutil.copy(trained / 'images' / '2.png', trained / 'images' / '1.png')
  with (trained / 'images' / '3.png').open('ab') as file:
    file.write(b'more')
  with pytest.raises(errors.UserError, match=r'2 added, 1 removed, . changed'):
    go_on()
  assert (trained / 'run' / 'config.json').read_bytes() == config
  go_on('--allow=data')
  (change,) = json.loads((trained / 'run' / 'changes.json').read_text())
  assert change['step'] == 2
  assert change['data'].startswith('2 added, 1 removed')
  go_on()  # They are the run's now.


def test_an_evaluation_says_that_the_data_have_changed(trained, caplog):
  config = recipe.resolve(None, trained / 'run', {})
  dataset.source_to_evaluate(config, trained / 'run')
  assert not [m for m in caplog.messages if 'are not those' in m]
  pictures(trained / 'images', '7.png')
  evaluate = ['--mode=evaluate', '--workdir=run', '--config.evaluate.images=2']
  main.run([*evaluate, '--config.evaluate.draws=1'])
  (said,) = [m for m in caplog.messages if 'are not those' in m]
  assert said.endswith('run was trained on: 1 added')


CONFIG_DAMAGE = ['{"steps": ', '[1]', '\0' * 64, '{"steps": "many"}', None]


@pytest.mark.parametrize('text', CONFIG_DAMAGE)
def test_a_damaged_config_json_is_mended_from_the_checkpoint(
  text, trained, at_once, caplog
):
  file = trained / 'run' / 'config.json'
  before = json.loads(file.read_text())
  file.write_text(text) if text else file.unlink()
  if text:
    with pytest.raises(errors.UserError, match=r'config\.') as error:
      main.run(['--mode=sample', '--workdir=run'])
    assert '\n' not in str(error.value)
  go_on()
  (said,) = [m for m in caplog.messages if 'newest checkpoint' in m]
  assert 'config.json' in said
  assert json.loads(file.read_text()) == before | {'steps': 4}
  assert steps(trained) == [1, 2]


def test_damaged_lines_of_the_log_are_left_out_and_said(
  trained, at_once, caplog
):
  file = trained / 'run' / 'metrics.jsonl'
  first, second = file.read_text().splitlines(keepends=True)
  damage = '\0' * 64 + '\n{"loss": 1}\n[1]\n{"step": "x"}\n{"step": 1.5}\n'
  file.write_text(first + damage + second + '{"step": 3, "lo')
  go_on()
  (said,) = [m for m in caplog.messages if 'metrics.jsonl' in m][:1]
  assert '5 line(s) are damaged and left out, the first is line 2' in said
  assert steps(trained) == [1, 2]


def test_a_second_run_in_the_workdir_is_refused(trained, monkeypatch):
  monkeypatch.setattr(lock, 'WAIT', 0.5)
  holder = subprocess.Popen(
    [sys.executable, '-c', HOLDS, str(trained / 'run')],
    stdout=subprocess.PIPE,
    env=os.environ | {'PYTHONPATH': str(FOLDER.parents[1])},
  )
  try:
    assert holder.stdout.readline() == b'held\n'
    with pytest.raises(errors.UserError, match='is writing into run '):
      go_on()
  finally:
    holder.kill()
    holder.communicate()
  assert steps(trained) == [1, 2]


def test_a_run_that_diverged_goes_on_from_its_last_checkpoint(
  tmp_path, monkeypatch, stop_at
):
  """With another optimizer, on purpose; and it says so."""
  monkeypatch.chdir(tmp_path)
  pictures(tmp_path / 'images', *(f'{i}.png' for i in range(4)))
  rate = '--config.optimizer.learning_rate'
  # It is of step 1, whose update is by 0, and was being saved at that moment.
  said = r'after step 2 .* of step 1\. To resume from it'
  with pytest.raises(errors.Diverged, match=said):
    main.run(
      [
        *(*BEGIN, '--config.steps=4', *COMMON),
        *(f'{rate}=1e30', '--config.checkpoint.every=1'),
      ]
    )
  assert checkpoint.steps(tmp_path / 'run' / 'checkpoints') == [1]
  with pytest.raises(errors.UserError, match='--allow=optimizer'):
    go_on(f'{rate}=1e-6')
  go_on(f'{rate}=1e-6', '--allow=optimizer')
  assert steps(tmp_path) == [1, 2, 3, 4]
  (change,) = json.loads((tmp_path / 'run' / 'changes.json').read_text())
  assert change['optimizer.learning_rate'] == [1e30, 1e-6]
  assert change['step'] == 1
  stop_at(0)
  go_on('--config.steps=5')  # It is the run's now.


def test_a_workdir_among_the_data_is_no_data(tmp_path):
  pictures(tmp_path, '0.png', '1.png')
  for run in ('runs/a', 'cats/run'):
    pictures(tmp_path / run, '2.png')
    pictures(tmp_path / run / 'samples', '3.png')
    (tmp_path / run / 'checkpoints').mkdir()
    (tmp_path / run / 'config.json').write_text('{}')
  pictures(tmp_path / 'cats', '4.png')
  assert image_folder.find(str(tmp_path)) == ['0.png', '1.png', 'cats/4.png']
  with pytest.raises(errors.UserError, match='is the workdir of a run'):
    image_folder.find(str(tmp_path / 'runs' / 'a'))
  # Its samples may be named.
  assert image_folder.find(str(tmp_path / 'runs' / 'a' / 'samples')) == [
    '3.png'
  ]


def test_the_workdir_must_not_be_the_folder_of_the_data(tmp_path):
  pictures(tmp_path, '0.png', '1.png')
  with pytest.raises(errors.UserError, match='apart'):
    main.run(
      [
        *(f'--config={FOLDER}', f'--config.data.path={tmp_path}'),
        *(f'--workdir={tmp_path}', *COMMON),
      ]
    )


@pytest.mark.parametrize(
  'change',
  [
    lambda x, y: (x + 1, y),
    lambda x, y: (x[:-1], y[:-1]),
    lambda x, y: (x, 1 - y),
    lambda x, y: (x.astype(np.int16), y),
    lambda x, y: (x.reshape(len(x), -1), y),
  ],
)
def test_arrays_are_told_apart(change):
  images = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2)
  labels = np.array([0, 1, 0, 1, 1], np.int32)
  before = store.from_arrays(images, labels).held()
  assert not contents.changes(before, store.from_arrays(images, labels).held())
  assert contents.changes(
    before, store.from_arrays(*change(images, labels)).held()
  )


def test_classes_are_told_by_name_not_by_number():
  images, labels = np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1], np.int32)
  first = store.from_arrays(images, labels, ('a', 'b'))
  again = store.relabelled(first, ('b', 'a'))
  assert not contents.changes(first.held(), again.held())
  other = store.from_arrays(images, labels, ('a', 'c'))
  assert contents.changes(first.held(), other.held()) == '1 changed'


def test_a_caption_that_changed_is_noticed(tmp_path):
  pictures(tmp_path, '0.png', '1.png')
  keys = dict(path=str(tmp_path), image_size=(8, 8), channels=3)
  keys |= dict(max_unreadable=0, captions='file')

  def held(text):
    lines = [
      {'file_name': '0.png', 'text': 'a cat'},
      {'file_name': '1.png', 'text': text},
    ]
    told = '\n'.join(map(json.dumps, lines))
    (tmp_path / 'metadata.jsonl').write_text(told)
    return sources.folder(**keys).held()

  assert contents.changes(held('a dog'), held('a hog')) == '1 changed'
  assert not contents.changes(held('a dog'), held('a dog'))


def test_a_file_that_is_not_there_has_no_size(tmp_path):
  assert contents.size(str(tmp_path / 'none')) == -1
