"""Grids of samples while a run trains, and a learning rate that decays."""

import json

import pytest
import tiny
from conftest import TINY

from ddpm_jax import main
from ddpm_jax import previews


def test_grids_in_training_take_fewer_steps(tmp_path, capfd):
  """That of step 2 is the last one of a run of 2 steps that samples so."""
  short, run = tmp_path / 'short', tmp_path / 'run'
  main.run(
    [
      *(*TINY, f'--workdir={short}', '--config.steps=2'),
      '--config.sampler.steps=3',
    ]
  )
  main.run(
    [
      *(*TINY, f'--workdir={run}', '--config.steps=4'),
      *('--config.log.pictures_every=2', '--config.log.pictures_steps=3'),
    ]
  )
  said = capfd.readouterr().err
  assert f'samples of step 2: {run}/samples_2.png' in said
  for name in ('samples', 'progress'):
    first = (run / f'{name}_2.png').read_bytes()
    assert first == (short / f'{name}.png').read_bytes()
  assert not list(run.glob('*_4.png'))


@pytest.mark.parametrize(
  'changes',
  [
    {'model__variance': 'learned', 'loss__name': 'vlb'},
    {'model__predict': 'mu'},
  ],
)
def test_a_model_that_cannot_skip_steps_takes_them_all(changes, capfd):
  config = tiny.config(
    **changes | {'sampler__steps': f'{tiny.T}'},
    log__pictures_every='5',
    log__pictures_steps='10',
  )
  assert previews.in_training(config) is config
  assert f'grids take {tiny.T} steps, and not config.log.pictures_steps=10' in (
    capfd.readouterr().err
  )


@pytest.mark.parametrize(
  ('every', 'steps', 'taken'),
  [(0, 3, 10), (5, 0, 10), (5, 3, 3), (5, 10, 10), (5, 20, 10)],
)
def test_they_never_take_more_steps_than_the_sampler(every, steps, taken):
  config = tiny.config(
    log__pictures_every=f'{every}', log__pictures_steps=f'{steps}'
  )
  assert config.sampler.steps == 10
  assert previews.in_training(config).sampler.steps == taken


def test_more_steps_change_a_decaying_learning_rate_and_that_is_said(
  tmp_path, capfd
):
  args = [*TINY, f'--workdir={tmp_path / "run"}', '--config.sampler.steps=2']
  args += ['--config.optimizer.decay=linear', '--config.optimizer.warmup=0']
  main.run([*args, '--config.steps=2'])
  main.run([*args, '--config.steps=4'])
  assert 'falls to 0 at step 4, and not at 2 as before' in (
    capfd.readouterr().err
  )
  (change,) = json.loads((tmp_path / 'run' / 'changes.json').read_text())
  assert change['steps'] == [2, 4]
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  rates = [json.loads(line)['learning_rate'] for line in lines]
  # 1e-3 (1 - k / steps): two steps of a run of 2, then two of a run of 4.
  assert rates == pytest.approx([1e-3, 5e-4, 5e-4, 2.5e-4])


def test_a_constant_learning_rate_goes_on_in_silence(tmp_path, capfd):
  args = [*TINY, f'--workdir={tmp_path / "run"}', '--config.sampler.steps=2']
  main.run([*args, '--config.steps=2'])
  main.run([*args, '--config.steps=4'])
  assert 'learning rate' not in capfd.readouterr().err
  assert not (tmp_path / 'run' / 'changes.json').exists()
