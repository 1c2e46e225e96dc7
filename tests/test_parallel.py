"""One device, eight, FSDP, rows and pmap: the same losses, weights, samples."""

import functools

import chex
import jax
import numpy as np
import pytest

from configs import digits
from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import functions
from ddpm_jax import recipe
from ddpm_jax.runtime import account
from ddpm_jax.runtime import parallel

pytestmark = pytest.mark.eight_devices

STEPS = 4


def config(**changes):
  c = digits.get_config()
  c.batch_size = 32
  c.data.flip = True
  c.model.update(channels=8, multipliers=(1,), blocks=1, groups=4, dropout=0.2)
  c.optimizer.warmup = 2
  c.sampler.steps = 8
  recipe.override(c, {k.replace('__', '.'): str(v) for k, v in changes.items()})
  return c


def batch(step, n=32, shape=(8, 8, 1)):
  rng = np.random.default_rng(step)
  return {
    'image': rng.integers(0, 256, (n, *shape), dtype=np.uint8),
    'index': np.arange(n, dtype=np.int32),
  }


def start(c):
  mesh = build.mesh(c)
  init = functools.partial(functions.init_state, c)
  return mesh, parallel.init_state(init, mesh)


@functools.cache
def train(**changes):
  """(losses, parameters and EMA, samples), as NumPy."""
  c = config(**changes)
  mesh, state = start(c)
  how, n = c.parallel.engine, c.batch_size
  step = parallel.compile_step(
    functions.train_step(c, parallel.parts(mesh)), mesh, how, state
  )
  losses = []
  for i in range(STEPS):
    rows = parallel.put(batch(i, n, recipe.shape(c)), mesh, how)
    state, metrics = step(state, rows)
    losses.append([float(metrics['loss']), float(metrics['grad_norm'])])
  cut = functools.partial(parallel.cut_rows, mesh=mesh)
  draw = parallel.compile_map(
    functions.sampler(c, seed=0, snapshots=2, cut=cut),
    mesh,
    how,
    state.ema_params,
  )
  index = parallel.put(np.arange(n // 2, dtype=np.int32), mesh, how)
  images = draw(state.ema_params, index)
  weights = jax.tree.map(np.asarray, (state.params, state.ema_params))
  return np.array(losses), weights, images


def one_device():
  return train(parallel__data=1)


@pytest.mark.parametrize(
  'changes',
  [
    dict(parallel__data=8),
    dict(parallel__data=1, parallel__fsdp=8),
    dict(parallel__data=2, parallel__fsdp=4),
    dict(parallel__engine='pmap', parallel__data=8),
    dict(parallel__data=1, accumulate=4),
    dict(parallel__engine='pmap', parallel__data=4, accumulate=2),
  ],
  ids=lambda changes: ' '.join(f'{k}={v}' for k, v in changes.items()),
)
def test_all_ways_agree_with_one_device(changes):
  agree(train(**changes), one_device())


def agree(some, one):
  losses, weights, images = some
  one_losses, one_weights, one_images = one
  # float32 sums in another order; Adam divides small gradients by their size,
  # so that rounding in them is a learning rate's share (1e-3) of an update.
  np.testing.assert_allclose(losses, one_losses, rtol=2e-5)
  chex.assert_trees_all_close(weights, one_weights, rtol=0, atol=2e-5)
  for a, b in zip(images, one_images, strict=True):
    # A rounding may carry a value over the edge between two grays.
    assert np.abs(a.astype(int) - b).max() <= 1
    assert np.mean(a != b) < 0.01


# Down and up again, with attention: all that rows go through.
LEVELS = dict(model__multipliers=(1, 1), model__attention=(4,))
# The network of 256x256, narrow.
LARGE = dict(
  batch_size=8,
  data__image_size=256,
  data__channels=3,
  model__multipliers=(1, 1, 2, 2, 4, 4),
  model__blocks=2,
  model__attention=(16,),
  sampler__steps=2,
)


def test_images_cut_into_rows_agree_with_one_device():
  axes = dict(parallel__data=2, parallel__fsdp=2, parallel__spatial=2)
  agree(train(**LEVELS, **axes), train(**LEVELS, parallel__data=1))


@pytest.mark.slow
def test_rows_and_parts_of_a_batch_agree_with_one_device():
  """With a row of the smallest level on each device."""
  axes = dict(parallel__data=2, parallel__spatial=4, accumulate=2)
  agree(train(**LEVELS, **axes), train(**LEVELS, parallel__data=1))


@pytest.mark.slow
@pytest.mark.parametrize('axes', [(2, 2, 2), (1, 1, 8)])
def test_large_images_cut_into_rows_agree_with_one_device(axes):
  names = ('parallel__data', 'parallel__fsdp', 'parallel__spatial')
  cut = dict(zip(names, axes, strict=True))
  agree(train(**LARGE, **cut), train(**LARGE, parallel__data=1))


def by_history(**changes):
  """Losses, t by importance, where all have a history after two of 8 steps."""
  c = config(loss__t='importance', loss__name='vlb', schedule__T=4, **changes)
  c.sampler.steps = 4
  mesh, state = start(c)
  how = c.parallel.engine
  step = parallel.compile_step(
    functions.train_step(c, mesh.size), mesh, how, state
  )
  losses = []
  for i in range(8):
    state, metrics = step(state, parallel.put(batch(i), mesh, how))
    losses.append(float(metrics['loss']))
  return np.array(losses), jax.tree.map(np.asarray, state.history)


by_history_on_one = functools.cache(
  functools.partial(by_history, parallel__data=1)
)


@pytest.mark.parametrize(
  'changes',
  [
    dict(parallel__data=2, parallel__fsdp=4),
    dict(parallel__engine='pmap', parallel__data=4, accumulate=2),
  ],
  ids=lambda changes: ' '.join(f'{k}={v}' for k, v in changes.items()),
)
def test_all_ways_draw_the_same_t_by_history(changes):
  losses, history = by_history(**changes)
  one_losses, one_history = by_history_on_one()
  assert history.seen.min() > 10
  np.testing.assert_array_equal(history.seen, one_history.seen)
  # Float32 sums in another order, as above.
  np.testing.assert_allclose(losses, one_losses, rtol=2e-5)
  np.testing.assert_allclose(history.losses, one_history.losses, rtol=2e-4)


def test_dropout_and_flip_were_part_of_that():
  """Else the comparison above would say nothing of them."""
  losses = one_device()[0]
  for changes in (dict(model__dropout=0), dict(data__flip=False)):
    other = train(parallel__data=1, **changes)[0]
    assert np.abs(other[1:] / losses[1:] - 1).max() > 1e-4


def test_fsdp_leaves_an_eighth_of_the_state_on_a_device():
  _, state = start(config(parallel__data=1, parallel__fsdp=8))
  whole = sum(x.nbytes for x in jax.tree.leaves(state))
  parts = [
    sum(x.addressable_shards[i].data.nbytes for x in jax.tree.leaves(state))
    for i in range(8)
  ]
  # A few arrays of four numbers do not divide.
  assert max(parts) < 1.05 * whole / 8


def test_fsdp_gathers_parameters_and_moves_no_activations():
  """Sharded kernels must not make XLA split the convolutions."""
  c = config(parallel__data=1, parallel__fsdp=8)
  mesh, state = start(c)
  step = parallel.compile_step(
    functions.train_step(c, mesh.size), mesh, 'jit', state
  )
  text = step.lower(state, parallel.put(batch(0), mesh, 'jit')).compile()
  text = text.as_text()
  assert 'all-gather' in text
  assert 'collective-permute' not in text
  assert 'all-to-all' not in text


@pytest.mark.parametrize('how', ['jit', 'pmap'])
def test_the_state_is_donated(how):
  c = config(parallel__engine=how)
  mesh, state = start(c)
  step = parallel.compile_step(
    functions.train_step(c, mesh.size), mesh, how, state
  )
  step(state, parallel.put(batch(0), mesh, how))
  kinds = {x.is_deleted() for x in jax.tree.leaves(state.params)}
  assert kinds == {True}


@pytest.mark.parametrize('how', ['jit', 'pmap'])
def test_an_image_is_the_same_in_any_batch(how):
  c = config(parallel__engine=how)
  mesh, state = start(c)
  draw = parallel.compile_map(
    functions.sampler(c, seed=3), mesh, how, state.ema_params
  )

  def images(index):
    index = np.array(index, np.int32)
    return draw(state.ema_params, parallel.put(index, mesh, how))[0]

  whole = images(range(16))
  other = images([11, 3, *range(20, 26)])
  np.testing.assert_array_equal(other[:2], whole[[11, 3]])
  assert np.mean(whole[0] != whole[1]) > 0.5


def test_an_odd_number_of_parts_still_means_the_batch():
  """Accumulation takes rows from every device, and each row once."""
  from ddpm_jax.diffusion import training

  parts = training.split_batch({'index': np.arange(24)}, 3)['index']
  assert parts.shape == (3, 8)
  assert sorted(parts.ravel()) == list(range(24))
  assert [set(part // 6) for part in parts] == [{0, 1, 2, 3}] * 3


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(batch_size=30), 'batch_size=30 is not divisible by 8 device'),
    (dict(accumulate=3), 'accumulate=3'),
    (dict(parallel__data=3, parallel__fsdp=3), '8 device'),
    (dict(parallel__fsdp=16), '8 device'),
    (dict(parallel__data=0), '8 device'),
    (dict(parallel__engine='pmap', parallel__fsdp=2), 'pmap'),
    (dict(parallel__engine='jitt'), "did you mean 'jit'"),
    (dict(parallel__engine='pmap', parallel__spatial=2), 'pmap'),
    (dict(parallel__spatial=3), r'spatial=3 does not divide the 8 row'),
    (dict(parallel__spatial=8, **LEVELS), r'the 4 row.* 2 levels'),
    (dict(parallel__spatial=0), '8 device'),
    (dict(data__image_size='()', parallel__spatial=2), 'points'),
  ],
)
def test_devices_that_do_not_fit_are_a_line_for_the_user(changes, message):
  c = config(**changes)

  def begin():
    functions.train_step(c, parallel.parts(build.mesh(c)))

  with pytest.raises(errors.UserError, match=message):
    begin()


def test_a_step_on_several_devices_adds_gradients_and_moves_nothing_else():
  c = config(parallel__data=-1)
  mesh, state = start(c)
  step = parallel.compile_step(
    functions.train_step(c, mesh.size), mesh, 'jit', state
  )
  compiled = step.lower(state, parallel.put(batch(0), mesh, 'jit')).compile()
  said = account.of(compiled)
  assert set(said.collectives) == {'all-reduce'}
  reduced = said.collectives['all-reduce']
  gradients = sum(x.nbytes for x in jax.tree.leaves(state.params))
  # Beside them the loss, and what little the norm takes.
  assert gradients <= reduced.bytes < gradients + 1000
  assert reduced.in_loops == 0
  assert said.host_transfers == ()


def test_sampling_on_several_devices_moves_nothing():
  c = config(parallel__data=-1)
  mesh, state = start(c)
  params = state.ema_params
  draw = parallel.jit_map(functions.sampler(c, 0), mesh, params)
  rows = parallel.put(np.arange(16, dtype=np.int32), mesh, 'jit')
  said = account.of(draw.lower(params, rows).compile())
  assert said.collectives == {}
  assert said.host_transfers == ()


def test_flags_of_the_user_come_before_our_own_to_the_compiler(monkeypatch):
  mesh, level = parallel.make_mesh(), '--xla_backend_optimization_level'
  monkeypatch.delenv('XLA_FLAGS')
  assert parallel.compiler_options(mesh) == {level[2:]: 1}
  monkeypatch.setenv('XLA_FLAGS', f'--xla_cpu_enable_fast_math=false {level}=0')
  assert parallel.compiler_options(mesh) == {}
