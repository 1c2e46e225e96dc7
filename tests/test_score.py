"""`--mode=score` and `--mode=compare`."""

import json
import shutil

import numpy as np
import pytest

from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax.jobs import score
from ddpm_jax.jobs.evaluate import record


@pytest.fixture
def workdir(tiny_run, tmp_path):
  copied = tmp_path / 'runs' / 'tiny'
  shutil.copytree(tiny_run[0], copied)
  return copied


def test_a_run_is_scored_and_compared(workdir, capsys):
  args = ['--mode=score', f'--workdir={workdir}', '--num_samples=30']
  main.run(args)
  out = capsys.readouterr().out
  assert 'small-data score' in out
  assert 'FID' not in out
  (first,) = score.read(workdir)
  assert first['fake_images'] == 30
  assert first['classifier_accuracy'] > 0.9
  assert sum(first['class_share']) == pytest.approx(1)
  # A network of 200 tiny steps is far from the data; held-out digits are not.
  assert first['frechet_distance'] > 2 * first['held_out_frechet_distance']

  made = (workdir / 'classifier.npz').stat().st_mtime_ns
  main.run([*args, '--seed=1'])
  assert (workdir / 'classifier.npz').stat().st_mtime_ns == made
  kept, second = score.read(workdir)
  assert kept == first
  assert second['frechet_distance'] != first['frechet_distance']

  evaluate = ['--mode=evaluate', f'--workdir={workdir}']
  main.run(
    [*evaluate, '--config.evaluate.images=8', '--config.evaluate.draws=2']
  )
  capsys.readouterr()
  main.run(['--mode=compare', f'--workdir={workdir.parent}'])
  rows = [
    line.strip('| ').split(' | ')
    for line in capsys.readouterr().out.splitlines()
    if line.startswith('| tiny |')
  ]
  (bound,) = record.read(workdir)['bounds']
  assert rows[0][:7] == ['tiny', '200', 'digits', 'EMA', 'all', '8', '2']
  assert f'{bound["bits_per_dim"]:.3f}' in rows[0]
  for row, found in zip(rows[1:], (first, second), strict=True):
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
    (['--mode=score', '--num_samples=3'], 'needs 10'),
    (['--mode=score', '--output=x'], '--output'),
    (['--mode=compare'], 'holds no run'),
  ],
)
def test_mistakes_are_one_line(args, message, tiny_run):
  with pytest.raises(errors.UserError, match=message):
    main.run([*args, f'--workdir={tiny_run[0]}'])
