"""The names of classes, and that a number means one of them for good."""

import argparse
import json
import pathlib

import conftest
import numpy as np
import pytest
from PIL import Image

from configs import digits
from configs import folder as folder_recipe
from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax import samples
from ddpm_jax.metrics import classifier_score
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage import workdir


def classes(path, *names):
  """A folder of an image of gray i for each class i."""
  for i, name in enumerate(names):
    (path / name).mkdir(parents=True)
    gray = np.full((8, 8), i, np.uint8)
    Image.fromarray(gray).save(path / name / 'x.png')
  return path


def config(path, **changes):
  c = folder_recipe.get_config()
  c.data.update(path=str(path), image_size=8, channels=1)
  c.condition.name = 'label'
  recipe.override(c, {k.replace('__', '.'): v for k, v in changes.items()})
  return c.lock()


def numbers(source):
  """The number of the class of each gray."""
  batch = source.gather(np.arange(len(source)))
  grays = batch['image'][:, 0, 0, 0].tolist()
  return dict(zip(grays, batch['label'].tolist(), strict=True))


@pytest.fixture
def run(tmp_path, monkeypatch):
  """(what stands in the workdir) -> a workdir with a checkpoint."""
  monkeypatch.setattr(checkpoint, 'steps', lambda path: [7])

  def run(**files):
    (tmp_path / 'run').mkdir()
    for name, values in files.items():
      path = tmp_path / 'run' / f'{name}.json'
      path.write_text(json.dumps(values))
    return tmp_path / 'run'

  return run


def test_a_new_run_numbers_classes_in_natural_order(tmp_path):
  data = classes(tmp_path / 'data', '2', '10', '1')
  source = dataset.source(config(data), folder=tmp_path / 'run')
  assert source.class_names == ('1', '2', '10')
  assert numbers(source) == {0: 1, 1: 2, 2: 0}


def test_a_run_keeps_the_order_that_it_has_saved(tmp_path, run):
  data = classes(tmp_path / 'data', '2', '10', '1')
  source = dataset.source(
    config(data), folder=run(config={}, classes=['10', '1', '2'])
  )
  assert source.class_names == ('10', '1', '2')
  assert numbers(source) == {0: 2, 1: 0, 2: 1}


def test_a_run_of_before_keeps_the_order_of_text(tmp_path, run):
  data = classes(tmp_path / 'data', '2', '10', '1')
  source = dataset.source(config(data), folder=run(config={}))
  assert source.class_names == ('1', '10', '2')
  assert numbers(source) == {0: 2, 1: 1, 2: 0}


def test_numbers_as_labels_are_themselves_in_a_run_of_before(tmp_path, run):
  labels = np.arange(12)
  images = np.zeros((12, 8, 8, 1), np.uint8)
  np.savez(tmp_path / 'a.npz', images=images, labels=labels)
  c = config(tmp_path / 'a.npz', data__name='arrays')
  source = dataset.source(c, folder=run(config={}))
  assert source.class_names == tuple(map(str, range(12)))
  np.testing.assert_array_equal(source.gather(labels)['label'], labels)


def test_other_classes_than_those_of_the_run_are_refused(tmp_path, run):
  data = classes(tmp_path / 'data', 'cat', 'dog')
  folder = run(config={}, classes=['ant', 'cat'])
  message = r"run/classes.json \('dog' is new, 'ant' is missing\)"
  with pytest.raises(errors.UserError, match=message):
    dataset.source(config(data), folder=folder)
  words = {'condition__name': 'text', 'data__captions': 'classes'}
  with pytest.raises(errors.UserError, match=message):
    dataset.source(config(data, **words), folder=folder)
  # What is told no classes may have others.
  source = dataset.source(config(data, condition__name=''), folder=folder)
  assert source.class_names == ('cat', 'dog')


def test_the_data_say_how_many_classes_there_are(tmp_path):
  data = classes(tmp_path / 'data', 'cat', 'dog', 'eel')
  c = config(data)
  settled = dataset.settled(c, dataset.source(c))
  assert settled.condition.classes == 3
  assert c.condition.classes == 0
  with pytest.raises(errors.UserError, match=r'3 classes, not .*=4'):
    dataset.source(config(data, condition__classes='4'))
  with pytest.raises(errors.UserError, match=r'condition\.classes=0 is for'):
    build.network(c)
  plain = classes(tmp_path / 'plain', '.')
  with pytest.raises(errors.UserError, match='has no classes'):
    dataset.source(config(plain))


def test_what_the_data_said_is_kept_by_the_run(tmp_path):
  began = config('x', condition__classes='3', data__max_value='4095')
  workdir.write_config(tmp_path, recipe.to_json(began))
  (tmp_path / 'checkpoints' / '7').mkdir(parents=True)
  spec = pathlib.Path(folder_recipe.__file__)
  same = {'condition.name': 'label', 'data.path': 'x'}
  same |= {'data.image_size': '8', 'data.channels': '1'}
  c = recipe.resolve(str(spec), tmp_path, same)
  assert c.condition.classes == 3
  assert c.data.max_value == 4095
  with pytest.raises(errors.UserError, match=r'condition.classes \(3 -> 4\)'):
    recipe.resolve(str(spec), tmp_path, same | {'condition.classes': '4'})


@pytest.mark.parametrize(
  ('label', 'number'),
  [('cat', 0), ('10', 1), ('0', 0), ('1', 1), ('2', 2), ('3', 3), ('a b', 3)],
)
def test_a_label_is_a_name_or_else_a_number(label, number):
  c = config('', condition__classes='4')
  names = ('cat', '10', '2', 'a b')
  assert dataset.class_number(c, label, names) == number
  assert dataset.class_title(c, number, names) == names[number]


def test_a_label_that_is_not_there_names_those_that_are():
  c = config('', condition__classes='2')
  for wrong in ('fox', '2', '-1', '²'):
    with pytest.raises(errors.UserError, match='2 classes, 0 cat, 1 dog'):
      dataset.class_number(c, wrong, ('cat', 'dog'))


def test_names_are_listed_in_one_line():
  assert dataset.listed(tuple('0123456789')) == '0 to 9'
  assert dataset.listed(['cat', 'a\nb']) == '0 cat, 1 a b'
  many = dataset.listed([f'class {i * i}' for i in range(1000)])
  assert many.startswith('0 class 0, 1 class 1, 2 class 4, ')
  assert many.endswith(' ...')
  assert len(many) <= 200


def test_scores_call_classes_by_their_names(tmp_path):
  result = {
    **dict.fromkeys(
      [
        *('frechet_distance', 'kernel_distance', 'kernel_distance_error'),
        *('precision', 'recall', 'density', 'coverage', 'nearest_rmse'),
        *('sure_share', 'classifier_accuracy'),
      ],
      0.5,
    ),
    **{'fake_images': 9, 'real_images': 9},
    'class_share': [0.1, 0.2, 0.7],
    'real_class_share': [0.1, 0.2, 0.7],
  }
  assert 'share of class 2 ' in classifier_score.table(result)
  table = classifier_score.table(result | {'class_names': ['1', '2', '10']})
  shares = [line for line in table.splitlines() if 'share of class' in line]
  assert [line.split()[3:5] for line in shares] == [
    ['1', '10.0%'],
    ['2', '20.0%'],
    ['10', '70.0%'],
  ]


def test_a_run_says_keeps_and_takes_the_names_of_its_classes(
  tmp_path, stop_at, capsys
):
  data = classes(tmp_path / 'data', '0', '1', '2', '10')
  folder = tmp_path / 'run'
  tiny = [x for x in conftest.TINY if 'config=' not in x]
  tiny += [f'--config={folder_recipe.__file__}', f'--config.data.path={data}']
  tiny += ['--config.data.image_size=8', '--config.data.channels=1']
  tiny += ['--config.condition.name=label', '--config.condition.width=8']
  tiny += ['--config.sampler.steps=2', f'--workdir={folder}']
  main.run([*tiny, '--config.steps=1'])
  said = capsys.readouterr().err
  assert 'classes: 0 0, 1 1, 2 2, 3 10\n' in said
  assert workdir.read_classes(folder) == ('0', '1', '2', '10')
  assert workdir.read_config(folder)['condition']['classes'] == 4
  # The same words go on, and so does the workdir alone.
  stop_at(0)
  main.run([*tiny, '--config.steps=2'])
  main.run([f'--workdir={folder}', '--config.steps=3'])
  assert capsys.readouterr().err.count('resuming from step 1') == 2

  c = recipe.resolve(None, folder, {})
  args = argparse.Namespace(prompt=None, prompts=None, workdir=folder)
  args.label, args.num_samples = ['10', '3', '2'], 2
  wanted, rows = samples.asked(c, args)
  assert wanted == ['10', '10', '2']
  assert rows.tolist() == [3, 3, 3, 3, 2, 2]

  (data / '10').rename(data / '9')
  with pytest.raises(errors.UserError, match="'9' is new, '10' is missing"):
    main.run([f'--workdir={folder}', '--config.steps=4'])


def test_nothing_is_made_before_the_data_are_there(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  spec = f'--config={folder_recipe.__file__}'
  with pytest.raises(errors.UserError, match=r'data\.path'):
    main.run([spec])
  with pytest.raises(errors.UserError, match='does not exist'):
    main.run([spec, '--config.data.path=nowhere', '--workdir=a/b'])
  assert not list(tmp_path.iterdir())


def test_a_folder_is_tried_without_making_it(tmp_path):
  workdir.check(tmp_path / 'a' / 'b')
  assert not list(tmp_path.iterdir())
  (tmp_path / 'file').write_text('')
  for path in (tmp_path / 'file', tmp_path / 'file' / 'a'):
    with pytest.raises(errors.UserError, match='is a file, or inside one'):
      workdir.check(path)


# Splits.


@pytest.mark.parametrize('name', ['digits', 'folder', 'arrays', 'points'])
def test_a_split_of_data_without_splits_is_refused(name):
  c = digits.get_config('paper')
  c.data.name = name
  assert dataset.split_to_evaluate(c) == 'all'
  c.evaluate.split = 'test'
  with pytest.raises(errors.UserError, match=f'evaluate.split=test.* {name} '):
    dataset.source_to_evaluate(c)
  c.evaluate.split, c.data.split = '', 'train[:50%]'
  with pytest.raises(errors.UserError, match=f'data.split=train.* {name} '):
    dataset.source(c)


def test_a_set_with_splits_is_evaluated_on_the_one_that_is_named():
  c = digits.get_config('paper')
  c.data.name = 'tfds'
  assert dataset.split_to_evaluate(c) == 'train'
  c.evaluate.split = 'test'
  assert dataset.split_to_evaluate(c) == 'test'


def test_an_evaluation_refuses_a_split_before_all_else(tmp_path):
  workdir.write_config(tmp_path, recipe.to_json(digits.get_config('paper')))
  wrong = [f'--workdir={tmp_path}', '--config.evaluate.split=test']
  for more in ([], ['--num_samples=9', '--reference=none.npz']):
    with pytest.raises(errors.UserError, match='digits has no splits'):
      main.run(['--mode=evaluate', *wrong, *more])
