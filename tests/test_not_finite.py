"""What is not finite is an error that says where, and nothing is written."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import drawing
from ddpm_jax import errors
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax import trainer
from ddpm_jax.evaluation import bound
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage import outputs


@pytest.fixture(scope='module')
def config():
  config = recipe.shipped('digits')
  config = config.copy_and_resolve_references()
  config.model.update(channels=8, multipliers=(1,), groups=4)
  config.schedule.T = config.sampler.steps = 5
  config.parallel.data = 1
  return config


@pytest.fixture(scope='module')
def state(config):
  return jax.jit(functools.partial(build.init_state, config))()


def with_bias(params, value):
  """The weights with that bias of the last layer."""
  return params | {
    'conv_out': {**params['conv_out'], 'bias': jnp.full(1, value)}
  }


@pytest.fixture(scope='module')
def broken(config, state):
  """A small run of which a weight is NaN: (config, engine, weights)."""
  return config, build.engine(config), with_bias(state.params, jnp.nan)


def test_samples_name_the_image_and_the_time(broken):
  config, engine, params = broken
  draw = drawing.sampler(config, engine, 3)
  with pytest.raises(errors.RunError, match=r'image 0 .* t = 5'):
    drawing.gather(draw(params, seed=0))


def test_what_was_only_drawn_to_fill_a_batch_is_not_looked_at():
  drawing.check_finite(np.zeros(4, int), 64)
  with pytest.raises(errors.RunError, match=r'image 66 .* t = 7'):
    drawing.check_finite(np.array([0, 0, 7, 9]), 64)


def test_a_folder_has_all_images_or_none(tmp_path):
  def batches():
    yield np.zeros((2, 8, 8, 1), np.uint8)
    raise errors.RunError('image 2 is not finite')

  (tmp_path / 'mine.txt').touch()
  with pytest.raises(errors.RunError, match='image 2'):
    outputs.save(tmp_path, batches(), 4, {})
  assert [p.name for p in tmp_path.iterdir()] == ['mine.txt']


def test_the_bound_names_the_image_and_the_time(broken):
  config, engine, params = broken
  with pytest.raises(errors.RunError, match='bound of image 0 is nan at t = 1'):
    bound.bound_of(config, engine, params, dataset.source(config), 5, seed=0)


def test_figures_are_not_drawn(broken, tmp_path):
  config, engine, params = broken
  run = runs.Run(tmp_path, config, engine, 'EMA', 0, params, 0)
  rows = {'x': np.ones(3, np.float32)}
  with pytest.raises(errors.RunError, match='not finite'):
    run.map(lambda params, rows: jnp.log(rows['x'] - 1), rows)
  assert run.map(lambda params, rows: rows['x'] + 1, rows).tolist() == [2, 2, 2]


def test_weights_name_the_array(tmp_path):
  tree = {'a': jnp.ones(3), 'b': {'c': jnp.array([1.0, jnp.inf])}}
  checkpoints = checkpoint.open(tmp_path)
  checkpoint.save(checkpoints, 4, state=tree, ema=tree, data=0, config={})
  checkpoint.close(checkpoints)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )
  with pytest.raises(errors.RunError, match=r'checkpoint 4 .* ema/b/c'):
    checkpoint.restore_item(tmp_path, 'ema', abstract)


def test_scores_name_the_score():
  good = {'FID': 3.0, 'images': 5, 'shares': [0.5, 0.5]}
  assert errors.finite(good, 'score') is good
  with pytest.raises(errors.RunError, match='score KID is nan'):
    errors.finite({**good, 'KID': float('nan')}, 'score')


def test_no_checkpoint_is_promised_that_is_not_there(tmp_path):
  assert 'no checkpoint' in str(trainer.diverged('x', tmp_path))
  (tmp_path / 'checkpoints' / '7').mkdir(parents=True)
  (tmp_path / 'checkpoints' / '9.orbax-checkpoint-tmp').mkdir()
  assert 'is of step 7. To resume from it' in str(
    trainer.diverged('x', tmp_path)
  )


@pytest.mark.parametrize('weight', [np.nan, np.inf, -1e30, 1e6])
@pytest.mark.parametrize('field', ['params', 'ema_params'])
def test_weights_that_no_run_can_go_on_from_are_not_saved(state, field, weight):
  trainer.check_weights(state, 3)
  bad = with_bias(state.params, weight)
  with pytest.raises(errors.Diverged, match=r'after step 3 .*conv_out/bias'):
    trainer.check_weights(state.replace(**{field: bad}), 3)


def test_a_run_that_diverged_is_not_to_be_tried_again():
  code, line = errors.verdict(errors.Diverged('the loss is nan'))
  assert code == 2
  assert 'the loss is nan' in line
