"""A run goes on on other devices, by either engine."""

import json

import chex
import conftest
import numpy as np
import pytest
from test_main import weights

from ddpm_jax import main

pytestmark = pytest.mark.eight_devices


def losses(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line)['loss'] for line in text.splitlines()]


def test_a_run_goes_on_on_other_devices(tmp_path, stop_at, capfd):
  def train(name, step, *where):
    stop_at(step)
    main.run(
      [
        *(*conftest.TINY, f'--workdir={tmp_path / name}'),
        *('--config.steps=99', *where),
      ]
    )
    return capfd.readouterr().err

  one = '--config.parallel.data=1'
  train('still', 12, one)
  train('moved', 4, one)
  err = train('moved', 8, '--config.parallel.fsdp=4', one)
  assert '4 device(s)' in err
  assert 'going on from step 4' in err
  two = '--config.parallel.data=2'
  err = train('moved', 12, '--config.parallel.engine=pmap', two)
  assert '2 device(s)' in err
  assert 'going on from step 8' in err
  # To rounding, which training magnifies: Adam divides by small numbers.
  np.testing.assert_allclose(
    losses(tmp_path / 'moved'), losses(tmp_path / 'still'), rtol=2e-3
  )
  moved, still = weights(tmp_path / 'moved'), weights(tmp_path / 'still')
  assert moved.data == still.data
  chex.assert_trees_all_close(
    (moved.state, moved.ema), (still.state, still.ema), rtol=0, atol=2e-3
  )
