"""The training step, on a network of a few numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from ddpm_jax import build
from ddpm_jax import functions
from ddpm_jax.diffusion import pixels
from ddpm_jax.diffusion import training

BATCH = {'x': jnp.linspace(-1, 1, 12), 'index': jnp.arange(12)}


def quadratic(params, key, batch, history=None):
  """Losses (B,), least where w = x, with noise that follows from the key."""
  noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))
  error = params['w'] - batch['x'] - 0.1 * noise(batch['index'])
  return error**2, None


def state(tx, w=1.0):
  params = {'w': jnp.float32(w)}
  return training.TrainState.create(
    apply_fn=None, params=params, ema_params=dict(params), tx=tx
  )


def step(state, **kwargs):
  kwargs = {'ema': 0.9, 'key': jax.random.key(0)} | kwargs
  return training.train_step(state, BATCH, loss_fn=quadratic, **kwargs)


def test_one_step_is_the_gradient_and_the_average():
  s = state(optax.sgd(0.5))
  new, metrics = step(s)
  key = jax.random.fold_in(jax.random.key(0), 0)
  f = lambda p: quadratic(p, key, BATCH)[0].mean()  # noqa: E731
  loss, gradient = jax.value_and_grad(f)(s.params)
  assert metrics['loss'] == pytest.approx(float(loss), rel=1e-6)
  assert metrics['grad_norm'] == pytest.approx(
    float(abs(gradient['w'])), rel=1e-6
  )
  w = float(1 - 0.5 * gradient['w'])
  assert new.params['w'] == pytest.approx(w, rel=1e-6)
  assert new.ema_params['w'] == pytest.approx(0.9 * 1 + 0.1 * w, rel=1e-6)
  assert new.step == 1


def test_noise_differs_by_step_and_is_the_same_for_the_same_step():
  """So does dropout: its key comes from the same one."""
  s = state(optax.sgd(0.0))
  first = step(s)[1]['loss']
  second = step(s.replace(step=1))[1]['loss']
  assert first != second
  assert first == step(s)[1]['loss']


@pytest.mark.parametrize('n', [2, 3, 12])
def test_accumulation_changes_nothing(n):
  whole, w = step(state(optax.sgd(0.5)))
  parts, p = step(state(optax.sgd(0.5)), accumulate=n)
  np.testing.assert_allclose(parts.params['w'], whole.params['w'], atol=1e-6)
  np.testing.assert_allclose(p['loss'], w['loss'], atol=1e-6)


def optimizer(**changes):
  c = base.get_config()
  c.optimizer.update(**changes)
  tx = build.optimizer(c)
  return tx, tx.init({'w': jnp.zeros(3)})


def test_the_learning_rate_rises_linearly_from_0():
  tx, s = optimizer(warmup=4, learning_rate=0.4)
  rates = []
  for _ in range(7):
    update, s = tx.update({'w': jnp.full(3, 0.5)}, s)
    rates.append(-float(update['w'][0]))  # Adam's step for constant gradients
  np.testing.assert_allclose(
    # float32 powers of Adam's 0.999 cost some digits.
    rates,
    [0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4],
    rtol=1e-4,
  )


@pytest.mark.parametrize(('norm', 'seen'), [(100.0, 1.0), (0.5, 0.5)])
def test_gradients_are_clipped_to_a_global_norm_of_1(norm, seen):
  # With a large eps Adam's first step tells how large its gradient was.
  tx, s = optimizer(warmup=0, learning_rate=1.0, eps=1e6)
  update, _ = tx.update({'w': jnp.array([norm, 0.0, 0.0])}, s)
  np.testing.assert_allclose(-update['w'][0], seen / 1e6, rtol=1e-5)


def test_uint8_survives_the_way_to_float_and_back():
  all_values = jnp.arange(256, dtype=jnp.uint8)
  x = pixels.to_float(all_values)
  assert x.min() == -1
  assert x.max() == 1
  np.testing.assert_array_equal(pixels.to_uint8(x), all_values)
  assert pixels.to_uint8(jnp.array([-7.0, 7.0])).tolist() == [0, 255]


def test_a_flip_mirrors_half_of_the_images_left_to_right():
  keys = jax.random.split(jax.random.key(0), 1000)
  x = jnp.tile(jnp.arange(6.0).reshape(1, 2, 3, 1), (1000, 1, 1, 1))
  y = pixels.random_flip(keys, x)
  flipped = np.asarray((y == x[:, :, ::-1]).all((1, 2, 3)))
  kept = np.asarray((y == x).all((1, 2, 3)))
  assert np.all(flipped ^ kept)
  assert abs(flipped.sum() - 500) < 5 * 16  # √(1000/4) = 16


def test_the_loss_at_initialisation_is_1():
  """The network answers 0 then, and E ε² = 1."""
  from configs import digits

  c = digits.get_config()
  c.model.update(channels=8, groups=4)
  c.batch_size = 256
  s = jax.jit(functools.partial(functions.init_state, c))()
  batch = {
    'image': jnp.zeros((256, 8, 8, 1), jnp.uint8),
    'index': jnp.arange(256),
  }
  losses, _ = jax.jit(functions.loss_fn(c))(s.params, jax.random.key(0), batch)
  # Mean of 16,384 squared normals: standard error √(2/16384) = 0.011.
  assert abs(losses.mean() - 1) < 5 * 0.011
  a = jax.tree.leaves(s.params)[0].unsafe_buffer_pointer()
  b = jax.tree.leaves(s.ema_params)[0].unsafe_buffer_pointer()
  assert a != b  # or donation would free it twice
