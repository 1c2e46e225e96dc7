"""`--mode=evaluate`: the same numbers on any devices, and honest ones."""

import shutil

import numpy as np
import pytest

from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax.jobs.evaluate import record


@pytest.fixture
def evaluate(tiny_run, tmp_path):
  """Evaluates a small run that was trained: the bound last added."""
  workdir = tmp_path / 'run'
  shutil.copytree(tiny_run[0], workdir)

  def evaluate(*args):
    main.run(['--mode=evaluate', f'--workdir={workdir}', *args])
    return record.read(workdir)['bounds'][-1]

  return evaluate


def test_the_parts_make_the_whole(evaluate, capsys):
  e = evaluate('--config.evaluate.images=11', '--config.evaluate.draws=4')
  total = e['L_T'] + e['L_1_to_T-1'] + e['L_0']
  assert e['bits_per_dim'] == pytest.approx(total, rel=1e-9)
  assert e['rate'] + e['distortion'] == pytest.approx(total, rel=1e-9)
  assert e['images'] == 11
  assert e['times_an_image'] == 5
  assert not e['exact_in_t']
  assert 0 < e['rmse'] < 255
  out = capsys.readouterr().out
  assert f'{e["bits_per_dim"]:.4f}' in out
  assert 'Monte Carlo' in out


def test_one_device_eight_and_pmap_agree(evaluate):
  common = ['--config.evaluate.images=19', '--config.evaluate.draws=3']
  common += ['--config.evaluate.batch_size=8']
  one, *others = (
    evaluate(*common, *how)
    for how in (
      ['--config.parallel.data=1'],
      ['--config.parallel.data=8'],
      ['--config.parallel.engine=pmap'],
      ['--config.parallel.data=1', '--config.evaluate.batch_size=100'],
    )
  )
  for other in others:
    assert other['bits_per_dim'] == pytest.approx(one['bits_per_dim'], rel=1e-5)
    assert other['L_t_by_t']['t'] == one['L_t_by_t']['t']


def test_monte_carlo_agrees_with_exact_within_its_error(evaluate):
  exact = evaluate('--config.evaluate.images=64')
  assert exact['exact_in_t']
  assert exact['L_t_by_t']['t'] == list(range(1, 1001))
  by_t = np.array(exact['L_t_by_t']['bits_per_dim'])
  assert by_t[1:].sum() == pytest.approx(exact['L_1_to_T-1'], rel=1e-6)
  rough = evaluate(
    '--config.evaluate.images=64', '--config.evaluate.draws=40', '--seed=3'
  )
  # The error of `rough` holds that of the images, which both share, as well.
  gap = abs(rough['bits_per_dim'] - exact['bits_per_dim'])
  assert gap < 5 * rough['standard_error']


def test_a_learned_network_beats_an_untrained_one(evaluate, tiny_run):
  assert evaluate('--config.evaluate.draws=10')['bits_per_dim'] < 8


def test_raw_weights_and_other_steps_are_other_weights(evaluate):
  common = ['--config.evaluate.images=8', '--config.evaluate.draws=2']
  found = [
    evaluate(*common, *which)
    for which in (
      [],
      ['--step=200'],
      ['--step=160'],
      ['--config.evaluate.weights=raw'],
      ['--config.sampler.weights=raw'],
    )
  ]
  assert found.pop() == found[-1]
  assert found[0] == found[1]
  assert [f['step'] for f in found] == [200, 200, 160, 200]
  assert [f['weights'] for f in found] == ['EMA', 'EMA', 'EMA', 'raw']
  assert len({f['bits_per_dim'] for f in found}) == 3


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--workdir=runs/none'], 'runs/none'),
    (['--output=here'], '--output'),
    (['--config.sampler.variance=learned'], 'does not fit'),
    (['--config.sampler.variance=betta'], "'beta'"),
    (['--config.evaluate.batch_size=0'], 'evaluate.batch_size'),
  ],
)
def test_mistakes_are_one_line(args, message, tiny_run):
  args = ['--mode=evaluate', f'--workdir={tiny_run[0]}', *args]
  with pytest.raises(errors.UserError, match=message):
    main.run(args)
