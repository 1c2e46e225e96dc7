"""Commands of the documentation, as they stand: minutes each, so `-m slow`."""

import json
import subprocess
import sys

import numpy as np
import pytest
from sklearn import datasets
from sklearn import model_selection
from sklearn import neural_network

from configs import digits_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def judge():
  """A classifier of real digits, and how sure it is of those held out."""
  x, y = datasets.load_digits(return_X_y=True)
  x, held_out, y, truth = model_selection.train_test_split(
    x / 16, y, test_size=0.3, random_state=0
  )
  judge = neural_network.MLPClassifier((128,), max_iter=300, random_state=0)
  judge.fit(x, y)
  assert judge.score(held_out, truth) > 0.97
  return judge, judge.predict_proba(held_out).max(1)


def run(user_env, *args):
  program = [sys.executable, '-m', 'ddpm_jax.main']
  subprocess.run([*program, *args], env=user_env, check=True)


def drawn(path):
  with np.load(path) as file:
    return file['images'].reshape(-1, 64) / 255


def test_the_digits_are_digits(tmp_path, user_env, judge):
  """A classifier of real digits is sure of most, and sees all ten."""
  workdir, output = f'--workdir={tmp_path}/digits', tmp_path / 'drawn.npz'
  run(user_env, workdir, '--config=configs/digits.py')
  run(user_env, workdir, '--mode=sample', '--num_samples=256',
      f'--output={output}')  # fmt: skip
  judge, really = judge
  images = drawn(output)
  sure = judge.predict_proba(images).max(1) > 0.9
  counts = np.bincount(judge.predict(images), minlength=10)
  print(
    f'sure of {sure.mean():.3f} drawn, {np.mean(really > 0.9):.3f} real; '
    f'{counts}'
  )
  assert sure.mean() > 0.75
  assert counts.min() >= 5


def test_digits_are_what_was_asked_for(tmp_path, user_env, judge):
  """95 times in 100, in three phrasings."""
  workdir, output = f'--workdir={tmp_path}/words', tmp_path / 'drawn.npz'
  run(user_env, workdir, '--config=configs/digits_text.py')
  names = digits_text.get_config().data.names
  phrasings = ('{}', 'please write {}', 'the number {}')
  prompts = [p.format(name) for p in phrasings for name in names]
  (tmp_path / 'prompts.txt').write_text('\n'.join(prompts))
  run(user_env, workdir, '--mode=sample', '--num_samples=10',
      f'--prompts={tmp_path}/prompts.txt', f'--output={output}')  # fmt: skip
  wanted = np.tile(np.repeat(np.arange(10), 10), len(phrasings))
  right = judge[0].predict(drawn(output)) == wanted
  print(f'{right.mean():.3f} right; {right.reshape(3, 10, 10).mean(2)}')
  assert right.mean() >= 0.95


def test_bfloat16_learns_as_float32_does(tmp_path, user_env):
  """The loss of steps 401 to 500, over three seeds."""
  losses = {}
  for dtype in ('float32', 'bfloat16'):
    for seed in range(3):
      folder = tmp_path / f'{dtype}_{seed}'
      run(user_env, f'--workdir={folder}', '--config=configs/digits.py',
          '--config.steps=500', f'--seed={seed}', '--config.sampler.steps=10',
          f'--config.model.dtype={dtype}')  # fmt: skip
      lines = (folder / 'metrics.jsonl').read_text().splitlines()[-10:]
      late = [json.loads(line)['loss'] for line in lines]
      losses.setdefault(dtype, []).append(np.mean(late))
  exact, rough = (np.array(x) for x in losses.values())
  print(f'float32 {exact}, bfloat16 {rough}')
  # Three seeds say what noise is; the same seed has the same noise in both.
  assert abs(np.mean(rough - exact)) < 2 * np.std(exact, ddof=1) / 3**0.5
