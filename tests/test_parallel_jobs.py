"""What jobs make is the same on one device, on eight, and under pmap."""

import functools

import numpy as np
import pytest
import tiny

from configs import digits_text
from configs import swiss_roll
from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax import sampling
from ddpm_jax.data import captions
from ddpm_jax.evaluation import bound
from ddpm_jax.parallel import meshes
from ddpm_jax.study import pictures

pytestmark = pytest.mark.eight_devices


EIGHT = dict(parallel__data='8')
PMAP = dict(parallel__data='8', parallel__engine='pmap')


@functools.cache
def trained_with_texts(**changes):
  """Losses of two steps with texts, and guided samples."""
  c = digits_text.get_config()
  c.model.update(channels=8, multipliers=(1,), blocks=0, groups=4)
  c.condition.update(width=8, depth=1)
  c.batch_size, c.sampler.steps = 16, 4
  recipe.override(c, {k.replace('__', '.'): v for k, v in changes.items()})
  engine, source = build.engine(c), dataset.source(c)
  begin = functools.partial(build.begin, c)
  state = meshes.init_state(begin, engine.mesh, tiny.weights_of(c))
  step = engine.compile_step(build.train_step(c, engine.mesh.size), state)
  losses = []
  for i in range(2):
    index = np.arange(16, dtype=np.int32)
    batch = {**source.gather(index + 16 * i), 'index': index}
    state, metrics = step(state, engine.put(batch))
    losses.append([float(metrics['loss']), float(metrics['grad_norm'])])
  draw = engine.compile_map(sampling.sampler(c), state.ema_params)
  texts = captions.tokens(['a two', 'zero'], 48)
  rows = sampling.rows(0, np.arange(16), np.repeat(texts, 8, axis=0))
  return np.array(losses), draw(state.ema_params, engine.put(rows))


@pytest.mark.parametrize(
  'changes',
  [
    dict(parallel__data='2', parallel__fsdp='4'),
    pytest.param(PMAP, marks=pytest.mark.slow),
  ],
  ids=lambda changes: ' '.join(f'{k}={v}' for k, v in changes.items()),
)
def test_texts_and_guidance(changes):
  losses, (drawn, *_) = trained_with_texts(**changes)
  one_losses, (one_drawn, *_) = trained_with_texts(parallel__data='1')
  # As in test_parallel.
  np.testing.assert_allclose(losses, one_losses, rtol=2e-5)
  assert np.abs(drawn.astype(int) - one_drawn).max() <= 1
  assert np.mean(drawn != one_drawn) < 0.01
  assert np.ptp(one_drawn) > 100


def test_a_step_that_looks_back():
  """With points: their network is soon compiled."""
  drawn = []
  for data in (1, 8):
    c = swiss_roll.get_config()
    c.model.update(channels=8, blocks=1)
    c.sampler.update(name='dpm_solver_pp_2m', steps=10)
    c.parallel.data = data
    engine, params = build.engine(c), tiny.weights_of(c)
    draw = engine.compile_map(sampling.sampler(c), params)
    rows = engine.put(sampling.rows(0, np.arange(16)))
    drawn.append(draw(params, rows).images)
  # Sums in another order, over ten steps.
  np.testing.assert_allclose(*drawn, rtol=1e-4, atol=1e-4)
  assert drawn[0].std() > 0.1


def figure(**changes):
  config = tiny.config(**changes)
  engine = build.engine(config)
  return runs.Run(None, config, engine, 'EMA', 0, tiny.weights(), 0)


def test_what_a_figure_maps():
  """Three rows, which eight devices cannot share evenly."""
  index = np.arange(3, dtype=np.int32)
  rows, c = {'index': index, 'x': index.astype(np.float32)}, tiny.config()

  def fn(params, rows):
    _, noise = sampling.noise(c, 0, rows['index'])
    kernel = params['Conv_0']['kernel'][0, 0][None]
    return kernel * noise[:, 0] + rows['x'][:, None, None]

  one, *others = (
    figure(**changes).map(fn, rows)
    for changes in ({}, EIGHT, PMAP, dict(parallel__fsdp='8'))
  )
  assert one.shape == (3, 8, 8)
  assert np.all(one[1] != one[0] + 1)
  for other in others:
    np.testing.assert_allclose(other, one, atol=1e-6)


def test_a_figure():
  one, other = (
    pictures.shared(figure(**changes), count=2).tiles.astype(int)
    for changes in ({}, PMAP)
  )
  # A rounding may lie on either side of a gray's edge.
  assert np.abs(other - one).max() <= 1
  assert np.ptp(one) > 100


def test_a_bound():
  """Of 19 images in batches of 8: the last is not full."""

  def bound_of(**changes):
    c = tiny.config(evaluate__draws='3', evaluate__batch_size='8', **changes)
    source, params = dataset.source(c), tiny.weights()
    return bound.bound_of(c, build.engine(c), params, source, 19, 0)

  one = bound_of()
  assert one.terms.shape == (19, 4)
  for changes in (EIGHT, PMAP):
    other = bound_of(**changes)
    np.testing.assert_array_equal(other.t, one.t)
    # Sums in another order.
    np.testing.assert_allclose(other.terms, one.terms, rtol=1e-4)
    np.testing.assert_array_equal(other.prior, one.prior)
