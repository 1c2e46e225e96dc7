"""The training step, on a network of a few numbers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from configs import digits
from configs import swiss_roll
from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax.diffusion import pixels
from ddpm_jax.diffusion import training
from ddpm_jax.parallel import engines
from ddpm_jax.parallel import meshes

pytestmark = pytest.mark.eight_devices

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


@pytest.mark.smoke
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


@pytest.mark.parametrize(
  ('decay', 'rates'),
  [
    ('linear', [0.0, 0.2, 0.4, 0.3, 0.2, 0.1, 0.0]),
    # 0.2 (1 + cos(π k / 4))
    ('cosine', [0.0, 0.2, 0.4, 0.341421, 0.2, 0.058579, 0.0]),
    ('', [0.0, 0.2, 0.4, 0.4, 0.4, 0.4, 0.4]),
  ],
)
def test_the_learning_rate_falls_to_0_at_the_last_step(decay, rates):
  c = base.get_config()
  c.steps = 6
  c.optimizer.update(warmup=2, learning_rate=0.4, decay=decay)
  rate = build.learning_rate(c)
  # float32: 1e-6 is ten units in the last place.
  np.testing.assert_allclose(
    [float(rate(step)) for step in range(7)], rates, atol=1e-6
  )
  c.optimizer.warmup = 0
  after = float(build.learning_rate(c)(3))
  assert after == pytest.approx(0.2 if decay else 0.4)


@pytest.mark.parametrize(('norm', 'seen'), [(100.0, 1.0), (0.5, 0.5)])
def test_gradients_are_clipped_to_a_global_norm_of_1(norm, seen):
  # With a large eps Adam's first step tells how large its gradient was.
  tx, s = optimizer(warmup=0, learning_rate=1.0, eps=1e6)
  update, _ = tx.update({'w': jnp.array([norm, 0.0, 0.0])}, s)
  np.testing.assert_allclose(-update['w'][0], seen / 1e6, rtol=1e-5)


@pytest.mark.parametrize('clip', [0.5, 100.0])
@pytest.mark.parametrize(
  'axes',
  [dict(data=1), dict(data=8), dict(data=1, fsdp=8), dict(data=8, how='pmap')],
  ids=str,
)
@pytest.mark.smoke
def test_what_is_clipped_is_the_gradient_of_the_whole_batch(axes, clip):
  """g min(1, c/‖g‖) of the mean g over all devices, and not of each one's."""
  how = axes.get('how', 'jit')
  mesh = meshes.make_mesh(axes['data'], axes.get('fsdp', 1))
  c = base.get_config()
  # Adam's first step is lr g / (|g| + eps): here g, but for rounding.
  c.optimizer.update(warmup=0, learning_rate=1e8, eps=1e8, clip=clip)
  start = {'w': jnp.linspace(-1, 1, 8), 'b': jnp.float32(0.5)}
  rows = {
    'w': np.random.default_rng(0).normal(1, 10, (16, 8)).astype(np.float32),
    'b': np.linspace(0, 1, 16, dtype=np.float32),
    'index': np.arange(16, dtype=np.int32),
  }

  def linear(params, key, batch, history):
    return batch['w'] @ params['w'] + batch['b'] * params['b'], None

  def init():
    params = jax.tree.map(jnp.copy, start)
    return training.TrainState.create(
      apply_fn=None, params=params, ema_params=start, tx=build.optimizer(c)
    )

  step = functools.partial(
    training.train_step, loss_fn=linear, key=jax.random.key(0), ema=0.9
  )
  engine = engines.ENGINES[how](mesh)
  before = meshes.init_state(init, mesh)
  compiled = engine.compile_step(step, before)
  after, metrics = compiled(before, engine.put(rows))

  def clipped(rows):
    g = np.append(rows['w'].mean(0), rows['b'].mean())
    norm = np.linalg.norm(g)
    return g * min(1, clip / norm), norm

  want, norm = clipped(rows)
  got = np.append(start['w'] - after.params['w'], 0.5 - after.params['b'])
  # Weights of 1 and updates of at most 6 are rounded to 6e-8 of themselves.
  np.testing.assert_allclose(got, want, atol=2e-6, rtol=2e-6)
  assert metrics['grad_norm'] == pytest.approx(norm, rel=1e-6)
  assert (norm > clip) == (clip == 0.5)
  each = [clipped({k: x[i : i + 2] for k, x in rows.items()}) for i in range(8)]
  other = np.mean([update for update, _ in each], axis=0)
  assert np.abs(other - want).max() > 0.01


@pytest.mark.parametrize('decay', [0.9, 0.9999])
def test_the_average_of_many_steps_is_its_closed_form(decay):
  """d^n p_0 + Σ_k (1-d) d^(n-k) p_k: from the first step on, no warm-up."""
  c, n = swiss_roll.get_config(), 50
  c.batch_size = 8
  c.model.update(channels=8, blocks=1)
  c.optimizer.update(ema=decay, warmup=0, learning_rate=0.1)
  batch = dataset.source(c).gather(np.arange(8)) | {'index': np.arange(8)}
  batch = jax.tree.map(jnp.asarray, batch)
  train_step = build.train_step(c, 1)

  def body(state, _):
    state, _ = train_step(state, batch)
    return state, state.params

  first = jax.jit(functools.partial(build.init_state, c))()
  last, after = jax.jit(lambda s: jax.lax.scan(body, s, length=n))(first)
  share = decay ** np.arange(n, -1, -1)
  share[1:] *= 1 - decay
  assert share.sum() == pytest.approx(1)

  def closed(p_0, p):
    every = np.concatenate([np.asarray(p_0)[None], p]).astype(np.float64)
    return np.tensordot(share, every, 1)

  want = jax.tree.map(closed, first.params, after)
  # n steps that round weights of up to 4 to 6e-8 of themselves, two at a time.
  chex.assert_trees_all_close(last.ema_params, want, rtol=0, atol=n * 5e-7)
  moved = jax.tree.map(lambda p, q: np.abs(p - q).max(), want, first.params)
  assert min(jax.tree.leaves(moved)) > 1e-3


def one_step_in(dtype):
  """(loss and norm of the gradient, what must be float32) of one step."""
  c = digits.get_config('paper')
  c.batch_size = 32
  c.model.update(
    channels=8, multipliers=(1,), attention=(), groups=4, dtype=dtype
  )
  shapes = jax.eval_shape(functools.partial(build.init_state, c)).params
  rng = np.random.default_rng(0)
  # Not the initial ones, by which the network answers 0.
  params = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape), shapes)
  params = jax.tree.map(np.float32, params)
  batch = dataset.source(c).gather(np.arange(32)) | {'index': np.arange(32)}
  batch = jax.tree.map(jnp.asarray, batch)
  step = jax.jit(build.train_step(c, 1))
  after, metrics = step(build.begin(c, params), batch)
  loss, adam = build.loss_fn(c), after.opt_state[1][0]
  gradient = jax.eval_shape(
    jax.grad(lambda p: loss(p, jax.random.key(0), batch)[0].mean()), params
  )
  trees = gradient, after.params, after.ema_params, adam.mu, adam.nu
  return np.array([metrics['loss'], metrics['grad_norm']]), (trees, metrics)


@pytest.mark.smoke
def test_a_step_in_bfloat16_keeps_in_float32_all_that_lasts():
  exact, _ = one_step_in('float32')
  rough, kept = one_step_in('bfloat16')
  assert {x.dtype.name for x in jax.tree.leaves(kept)} == {'float32'}
  # bfloat16 rounds to 0.4%, and errors of 32 x 64 pixels average out.
  np.testing.assert_allclose(rough, exact, rtol=0.02)
  assert np.all(rough != exact)


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
  c = digits.get_config('paper')
  c.model.update(channels=8, multipliers=(1,), attention=(), groups=4)
  c.batch_size = 256
  s = jax.jit(functools.partial(build.init_state, c))()
  batch = {
    'image': jnp.zeros((256, 8, 8, 1), jnp.uint8),
    'index': jnp.arange(256),
  }
  losses, _ = jax.jit(build.loss_fn(c))(s.params, jax.random.key(0), batch)
  # Mean of 16,384 squared normals: standard error √(2/16384) = 0.011.
  assert abs(losses.mean() - 1) < 5 * 0.011
  a = jax.tree.leaves(s.params)[0].unsafe_buffer_pointer()
  b = jax.tree.leaves(s.ema_params)[0].unsafe_buffer_pointer()
  assert a != b  # or donation would free it twice
