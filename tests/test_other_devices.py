"""A run goes on on other devices, by either engine."""

import json

import chex
import conftest
import numpy as np
import pytest
import test_main

from ddpm_jax import flags as command
from ddpm_jax import main

pytestmark = [pytest.mark.eight_devices, pytest.mark.smoke]
begun = test_main.begun


def losses(workdir):
  return [line['loss'] for line in test_main.metrics(workdir)]


def test_a_run_goes_on_on_other_devices(tmp_path, stop_at, capfd):
  still, moved = tmp_path / 'still', tmp_path / 'moved'

  def train(workdir, step, *where):
    stop_at(step)
    args = [*conftest.TINY, '--config.steps=99', *where]
    main.run([*args, f'--workdir={workdir}'])
    return capfd.readouterr().err

  one, two = '--config.parallel.data=1', '--config.parallel.data=2'
  train(still, 12, one)
  train(moved, 4, one)
  err = train(moved, 8, '--config.parallel.fsdp=4', one)
  assert '4 device(s)' in err
  assert 'resuming from step 4' in err
  err = train(moved, 12, '--config.parallel.engine=pmap', two)
  assert '2 device(s)' in err
  assert 'resuming from step 8' in err
  # To rounding, which training magnifies: Adam divides by small numbers.
  np.testing.assert_allclose(losses(moved), losses(still), rtol=2e-3)
  a, b = test_main.weights(moved), test_main.weights(still)
  assert a.data == b.data
  chex.assert_trees_all_close(
    (a.state, a.ema), (b.state, b.ema), rtol=0, atol=2e-3
  )


def test_a_batch_that_devices_cannot_share_is_refused(tmp_path):
  message = test_main.mistake(
    *(f'--config={conftest.DIGITS}', '--config.batch_size=30'),
    f'--workdir={tmp_path}',
  )
  assert 'not divisible by 8 device(s)' in message


def test_a_run_of_other_devices_takes_those_here(begun, capfd):
  file = begun / 'config.json'
  config = json.loads(file.read_text())
  file.write_text(json.dumps(config | {'parallel': test_main.ELSEWHERE}))

  def resolved(mode, *changes):
    args = command.parse([f'--workdir={begun}', mode, *changes])
    job = command.load(args.mode).JOB
    return main.config_of(args, job).parallel, args.parallel

  here, kept = resolved('--mode=sample')
  assert (here.data, here.fsdp, here.spatial) == (-1, 1, 1)
  assert kept == test_main.ELSEWHERE
  assert 'using 8 of 8 device(s)' in capfd.readouterr().err
  # As many as share the batch evenly, to train.
  assert resolved('--mode=train', '--config.batch_size=12')[0].data == 6
  assert 'using 6 of 8 device(s)' in capfd.readouterr().err
  # What is said now is meant.
  assert resolved('--mode=sample', '--config.parallel.data=2')[0].fsdp == 16
  assert capfd.readouterr().err == ''
