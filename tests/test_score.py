"""`--mode=score` and `--mode=compare`."""

import functools
import json
import shutil

import numpy as np
import pytest

from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax.evaluation import small_data
from ddpm_jax.metrics import classifier


@pytest.fixture
def workdir(tiny_run, tmp_path):
  copied = tmp_path / 'runs' / 'tiny'
  shutil.copytree(tiny_run[0], copied)
  return copied


def test_a_run_is_scored_and_compared(workdir, capsys, monkeypatch):
  # 100 steps, of 500: enough for 90% of the digits.
  quick = functools.partial(classifier.train, steps=100)
  monkeypatch.setattr(classifier, 'train', quick)
  args = ['--mode=score', f'--workdir={workdir}', '--num_samples=30']
  main.run(args)
  out = capsys.readouterr().out
  assert 'small-data score' in out
  assert 'FID' not in out
  (first,) = small_data.read(workdir)
  assert first['fake_images'] == 30
  assert first['classifier_accuracy'] > 0.9
  assert sum(first['class_share']) == pytest.approx(1)
  # A network of 200 tiny steps is far from the data; held-out digits are not.
  assert first['frechet_distance'] > 2 * first['held_out_frechet_distance']

  made = (workdir / 'classifier.npz').stat().st_mtime_ns
  main.run([*args, '--seed=1'])
  assert (workdir / 'classifier.npz').stat().st_mtime_ns == made
  kept, second = small_data.read(workdir)
  assert kept == first
  assert second['frechet_distance'] != first['frechet_distance']

  capsys.readouterr()
  main.run(['--mode=compare', f'--workdir={workdir.parent}'])
  rows = [
    line.strip('| ').split(' | ')
    for line in capsys.readouterr().out.splitlines()
    if line.startswith('| tiny |')
  ]
  for row, found in zip(rows, (first, second), strict=True):
    assert f'{found["frechet_distance"]:.3f}' in row


def test_data_without_labels_cannot_be_scored(workdir, tmp_path):
  np.save(tmp_path / 'x.npy', np.zeros((20, 8, 8, 1), np.uint8))
  config = json.loads((workdir / 'config.json').read_text())
  config['data'] |= {'name': 'arrays', 'path': str(tmp_path / 'x.npy')}
  (workdir / 'config.json').write_text(json.dumps(config))
  with pytest.raises(errors.UserError, match='no labels'):
    main.run(['--mode=score', f'--workdir={workdir}'])


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--mode=score', '--num_samples=3'], 'needs at least 10'),
    (['--mode=score', '--output=x'], '--output'),
    (['--mode=compare'], 'holds no run'),
  ],
)
def test_mistakes_are_one_line(args, message, tiny_run):
  with pytest.raises(errors.UserError, match=message):
    main.run([*args, f'--workdir={tiny_run[0]}'])
