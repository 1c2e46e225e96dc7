"""The README's first command, as it stands: minutes, so `-m slow`."""

import subprocess
import sys

import numpy as np
import pytest
from sklearn import datasets
from sklearn import model_selection
from sklearn import neural_network

pytestmark = pytest.mark.slow


def test_the_digits_are_digits(tmp_path, user_env):
  """A classifier of real digits is sure of most, and sees all ten."""
  workdir = tmp_path / 'digits'
  program = [sys.executable, '-m', 'ddpm_jax.main', f'--workdir={workdir}']
  subprocess.run(
    [*program, '--config=configs/digits.py'], env=user_env, check=True
  )
  output = tmp_path / 'drawn.npz'
  subprocess.run(
    [*program, '--mode=sample', '--num_samples=256', f'--output={output}'],
    env=user_env,
    check=True,
  )
  x, y = datasets.load_digits(return_X_y=True)
  x, held_out, y, truth = model_selection.train_test_split(
    x / 16, y, test_size=0.3, random_state=0
  )
  judge = neural_network.MLPClassifier((128,), max_iter=300, random_state=0)
  judge.fit(x, y)
  assert judge.score(held_out, truth) > 0.97

  drawn = np.load(output)['images'].reshape(256, 64) / 255
  sure = judge.predict_proba(drawn).max(1) > 0.9
  really = judge.predict_proba(held_out).max(1) > 0.9
  counts = np.bincount(judge.predict(drawn), minlength=10)
  print(f'sure of {sure.mean():.3f} drawn, {really.mean():.3f} real; {counts}')
  assert sure.mean() > 0.75
  assert counts.min() >= 5
