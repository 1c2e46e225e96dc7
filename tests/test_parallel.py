"""One device, eight, FSDP, rows and pmap: the same losses, weights, samples."""

import functools
from typing import Any
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import recipe
from ddpm_jax import sampling
from ddpm_jax import validate
from ddpm_jax.parallel import engines
from ddpm_jax.parallel import meshes
from ddpm_jax.planning import hlo

pytestmark = pytest.mark.eight_devices

STEPS = 4


def config(**changes):
  """The least network with all layers; t by a history of the whole batch."""
  c = digits.get_config('paper')
  c.batch_size = 32
  c.data.flip = True
  c.model.update(channels=8, multipliers=(1,), blocks=0, groups=4, dropout=0.2)
  c.loss.update(name='vlb', t='importance')
  c.schedule.T = 4
  c.optimizer.warmup = 2
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
  init = functools.partial(build.init_state, c)
  return mesh, meshes.init_state(init, mesh)


class Trained(NamedTuple):
  """What a few steps leave behind."""

  losses: np.ndarray  # (STEPS, 2), with the norm of the gradients
  first: Any  # the state before the first step
  state: Any  # and after the last
  step: Any  # (state, batch) -> (state, metrics), compiled
  batch: Any  # as it takes them
  draw: Any  # (index) -> samples, compiled
  images: Any  # half a batch of samples


@functools.cache
def train(**changes):
  c = config(**changes)
  mesh, first = start(c)
  engine, n = build.engine(c), c.batch_size
  step = engine.compile_step(
    build.train_step(c, meshes.num_shards(mesh)), first
  )
  losses, state = [], first
  for i in range(STEPS):
    rows = engine.put(batch(i, n, recipe.shape(c)))
    state, metrics = step(state, rows)
    losses.append([float(metrics['loss']), float(metrics['grad_norm'])])
  images_of = engine.compile_map(sampler(c, mesh), state.ema_params)

  def draw(index):
    rows = sampling.rows(0, np.array(index))
    return images_of(state.ema_params, engine.put(rows))

  images = draw(range(n // 2))
  return Trained(np.array(losses), first, state, step, rows, draw, images)


def sampler(c, mesh):
  shard = functools.partial(meshes.shard_rows, mesh=mesh)
  return sampling.sampler(c, snapshots=2, shard=shard)


def compiled(trained):
  """Its step once more, from the cache, to be looked at."""
  return trained.step.lower(trained.state, trained.batch).compile()


# Without a history nothing but gradients goes from device to device.
PLAIN = dict(loss__name='simple', loss__t='stratified', schedule__T=50)
ONE = dict(parallel__data=1)
DATA = dict(parallel__data=8)
FSDP = dict(parallel__data=2, parallel__fsdp=4)
PARTS = dict(parallel__data=4, accumulate=2)
PMAP = dict(parallel__engine='pmap', parallel__data=4, accumulate=2)
# Down and up again, with attention: all that rows go through.
LEVELS = dict(model__multipliers=(1, 1), model__attention=(4,))
ROWS = dict(parallel__data=2, parallel__fsdp=2, parallel__spatial=2)
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


def named(changes):
  return ' '.join(f'{k}={v}' for k, v in changes.items())


@pytest.mark.parametrize('changes', [FSDP, PARTS, PMAP], ids=named)
def test_all_ways_agree_with_one_device(changes):
  agree(train(**changes), train(**ONE))


def test_devices_that_share_gradients_alone_agree_with_one_device():
  agree(train(**PLAIN, **DATA), train(**PLAIN, **ONE))


def test_images_cut_into_rows_agree_with_one_device():
  agree(train(**LEVELS, **ROWS), train(**LEVELS, **ONE))


@pytest.mark.slow
def test_rows_and_parts_of_a_batch_agree_with_one_device():
  """With a row of the smallest level on each device."""
  axes = dict(parallel__data=2, parallel__spatial=4, accumulate=2)
  agree(train(**LEVELS, **axes), train(**LEVELS, **ONE))


@pytest.mark.slow
@pytest.mark.parametrize('axes', [(2, 2, 2), (1, 1, 8)])
def test_large_images_cut_into_rows_agree_with_one_device(axes):
  names = ('parallel__data', 'parallel__fsdp', 'parallel__spatial')
  cut = dict(zip(names, axes, strict=True))
  agree(train(**LARGE, **cut), train(**LARGE, **ONE))


def agree(some, one):
  # float32 sums in another order; Adam divides small gradients by their size,
  # so that rounding in them is a learning rate's share (1e-3) of an update.
  np.testing.assert_allclose(some.losses, one.losses, rtol=2e-5)
  for name in ('params', 'ema_params'):
    weights, one_weights = getattr(some.state, name), getattr(one.state, name)
    chex.assert_trees_all_close(weights, one_weights, rtol=0, atol=2e-5)
  for a, b in zip(some.images, one.images, strict=True):
    # A rounding may carry a value over the edge between two grays.
    assert np.abs(a.astype(int) - b).max() <= 1
    assert np.mean(a != b) < 0.01
  history, one_history = some.state.history, one.state.history
  if history is not None:
    # Every t has its 10 losses: the last t were drawn by them.
    assert history.seen.min() > 10
    np.testing.assert_array_equal(history.seen, one_history.seen)
    np.testing.assert_allclose(history.losses, one_history.losses, rtol=2e-4)


def test_dropout_flip_and_history_were_part_of_that():
  """Else the comparison above would say nothing of them."""
  state = train(**ONE).state
  rows = jax.tree.map(jnp.asarray, batch(0))
  # The last layer begins at 0: so small, it hides what the others do.
  params = jax.tree.map(lambda p: p + 0.1, state.params)
  history = state.history
  uniform = history._replace(seen=0 * history.seen)
  ways = [
    (build.loss_fn(config()), history),
    (build.loss_fn(config(model__dropout=0)), history),
    (build.loss_fn(config(data__flip=False)), history),
    (build.loss_fn(config()), uniform),
  ]

  @jax.jit
  def losses(key):
    """As they are, and without one thing."""
    return [f(params, key, rows, past)[0] for f, past in ways]

  as_it_is, *without = losses(jax.random.key(0))
  for other in without:
    assert np.abs(other / as_it_is - 1).max() > 1e-2


def test_fsdp_leaves_its_share_of_the_state_on_a_device():
  """A quarter; test_plan has it of an eighth."""
  leaves = jax.tree.leaves(train(**FSDP).state)
  whole = sum(x.nbytes for x in leaves)
  for i in range(8):
    part = sum(x.addressable_shards[i].data.nbytes for x in leaves)
    # A few numbers of steps and biases do not divide.
    assert part < 1.05 * whole / 4


def test_fsdp_gathers_parameters_and_moves_no_activations():
  """Sharded kernels must not make XLA split the convolutions."""
  text = compiled(train(**FSDP)).as_text()
  assert 'all-gather' in text
  assert 'collective-permute' not in text
  assert 'all-to-all' not in text


@pytest.mark.parametrize('changes', [ONE, FSDP, PMAP], ids=named)
def test_the_state_is_donated(changes):
  params = train(**changes).first.params
  assert all(x.is_deleted() for x in jax.tree.leaves(params))


@pytest.mark.parametrize('changes', [ONE, FSDP], ids=named)
def test_one_program_serves_all_steps(changes):
  assert train(**changes).step._cache_size() == 1


@pytest.mark.parametrize('changes', [PLAIN | DATA, PMAP], ids=named)
def test_an_image_is_the_same_in_any_batch(changes):
  trained = train(**changes)
  whole = trained.images.images
  other = trained.draw([11, 3, *range(20, 26)]).images
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
    (dict(parallel__spatial=3), r'spatial=3 must divide the 8 row'),
    (dict(parallel__spatial=8, **LEVELS), r'the 4 row.* 2 levels'),
    (dict(parallel__spatial=0), '8 device'),
    (dict(data__image_size='()', parallel__spatial=2), 'points'),
  ],
)
def test_devices_that_do_not_fit_are_a_line_for_the_user(changes, message):
  c = config(**changes)

  def begin():
    validate.devices(c)
    build.train_step(c, meshes.num_shards(build.mesh(c)))

  with pytest.raises(errors.UserError, match=message):
    begin()


def test_a_step_on_several_devices_adds_gradients_and_moves_nothing_else():
  trained = train(**PLAIN, **DATA)
  said = hlo.of(compiled(trained))
  assert set(said.collectives) == {'all-reduce'}
  reduced = said.collectives['all-reduce']
  gradients = sum(x.nbytes for x in jax.tree.leaves(trained.state.params))
  # Beside them the loss, and what little the norm takes.
  assert gradients <= reduced.bytes < gradients + 1000
  assert reduced.in_loops == 0
  assert said.host_transfers == ()


def test_sampling_on_several_devices_moves_nothing():
  c, params = config(**PLAIN, **DATA), train(**PLAIN, **DATA).state.ema_params
  engine = engines.Jit(build.mesh(c))
  draw = engine.jit_map(sampler(c, engine.mesh), params)
  rows = engine.put(sampling.rows(0, np.arange(16)))
  said = hlo.of(draw.lower(params, rows).compile())
  assert said.collectives == {}
  assert said.host_transfers == ()


def test_flags_of_the_user_come_before_our_own_to_the_compiler(monkeypatch):
  mesh, level = meshes.make_mesh(), '--xla_backend_optimization_level'
  monkeypatch.delenv('XLA_FLAGS')
  assert engines.compiler_options(mesh) == {level[2:]: 1}
  monkeypatch.setenv('XLA_FLAGS', f'--xla_cpu_enable_fast_math=false {level}=0')
  assert engines.compiler_options(mesh) == {}
