"""An opened workdir, as jobs and a notebook use it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax import run as runs


@pytest.fixture(scope='module')
def run(tiny_run):
  config = recipe.resolve(None, tiny_run[0], {})
  return runs.load(config, tiny_run[0])


def test_it_is_the_newest_checkpoint_of_the_recipe(run):
  assert (run.weights, run.step, run.seed) == ('EMA', 200, 0)
  assert run.config.data.name == 'digits'


def test_its_samples_are_those_of_the_program(run, tiny_run, tmp_path):
  """In more than one batch, the last of which is not full."""
  config = run.config.copy_and_resolve_references()
  config.sampler.batch_size = 4
  output = tmp_path / 'samples.npz'
  args = ['--mode=sample', f'--workdir={tiny_run[0]}', '--num_samples=6']
  main.run([*args, f'--output={output}'])
  with np.load(output) as file:
    want = file['images']
  np.testing.assert_array_equal(
    dataclasses.replace(run, config=config).sample(6), want
  )
  other = runs.load(run.config, run.workdir, seed=1).sample(6)
  assert np.mean(other != want) > 0.5


def test_another_checkpoint_and_other_weights_can_be_named(run):
  earlier = runs.load(run.config, run.workdir, step=160)
  assert earlier.step == 160
  raw = recipe.resolve(None, run.workdir, {'sampler.weights': 'raw'})
  assert runs.load(raw, run.workdir).weights == 'raw'
  with pytest.raises(errors.UserError, match='no checkpoint 7'):
    runs.load(run.config, run.workdir, step=7)


def test_a_function_is_mapped_over_rows_and_refused_if_not_finite(run):
  def fn(params, rows):
    del params
    return 1 / (rows['x'] - 5.0)

  rows = {'x': np.arange(5, dtype=np.float32)}
  np.testing.assert_allclose(run.map(fn, rows), 1 / (rows['x'] - 5))
  with pytest.raises(errors.RunError, match='the inverse would be of numbers'):
    run.map(lambda _, rows: jnp.log(rows['x'] - 2), rows, name='the inverse')
