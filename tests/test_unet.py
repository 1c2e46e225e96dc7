"""The network is the paper's, and takes what users have."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from configs import base
from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import recipe
from ddpm_jax.models import layers
from ddpm_jax.models import unet

# The least that has all layers: two levels, and no blocks going down.
SMALL = dict(out_channels=3, channels=8, multipliers=(1, 2), blocks=0, groups=4)


@functools.cache
def shapes(model, size=(32, 32), channels=3):
  x, t = jnp.zeros((1, *size, channels)), jnp.ones(1, int)
  return jax.eval_shape(model.init, jax.random.key(0), x, t)['params']


def count(params):
  return sum(x.size for x in jax.tree.leaves(params))


def variables(model, *args):
  """As after training: nothing is left at 0 or 1e-10."""
  if isinstance(model, unet.UNet):
    args = *args, jnp.ones(len(args[0]), int)
  shape = jax.eval_shape(model.init, jax.random.key(0), *args)
  rng = np.random.default_rng(0)

  def trained(x):
    fan_in = np.prod(x.shape[:-1]) if x.ndim > 1 else 10
    return jnp.asarray(rng.normal(0, fan_in**-0.5, x.shape), x.dtype)

  return jax.tree.map(trained, shape)


def apply(model, *args, **kwargs):
  """Under jit: faster than to compile every operation by itself."""
  return jax.jit(functools.partial(model.apply, **kwargs))(*args)


def images(b=2, size=(8, 8), channels=3):
  return jax.random.normal(jax.random.key(7), (b, *size, channels))


@pytest.mark.parametrize(
  ('config', 'expected'),
  [
    ('configs/cifar.py', 35_746_307),
    ('configs/celebahq.py', 113_673_219),
    ('configs/lsun.py:bedroom', 113_673_219),
    ('configs/lsun.py:bedroom_large', 255_677_955),
    ('configs/lsun.py:church', 113_673_219),
    ('configs/lsun.py:cat', 113_673_219),
  ],
)
def test_parameters_are_as_many_as_the_papers(config, expected):
  c = recipe.load(config)
  params = shapes(build.network(c), recipe.image_size(c))
  assert count(params) == expected


def test_a_learned_variance_adds_what_it_must():
  assert count(shapes(unet.UNet(out_channels=6))) == 35_749_766


def test_attention_follows_every_block_at_16_and_is_once_in_the_middle():
  params = shapes(build.network(base.get_config()))
  found = sorted(name for name in params if name.endswith('_attention'))
  assert found == [
    'down_1_0_attention',
    'down_1_1_attention',
    'middle_0_attention',
    'up_1_0_attention',
    'up_1_1_attention',
    'up_1_2_attention',
  ]


def test_time_embedding_is_sines_then_cosines():
  e = layers.time_embedding(jnp.array([0, 999]), 128)
  i = np.arange(64)
  angle = 999 * np.exp(-np.log(10_000) * i / 63)
  np.testing.assert_array_equal(e[0], np.repeat([0.0, 1.0], 64))
  # float32 angles of up to 999 radians are off by 6e-5.
  np.testing.assert_allclose(e[1, :64], np.sin(angle), atol=2e-4)
  np.testing.assert_allclose(e[1, 64:], np.cos(angle), atol=2e-4)


def test_the_output_at_initialisation_is_all_but_0():
  model, x, t = unet.UNet(**SMALL), images(), jnp.array([1, 1000])
  out, _ = jax.jit(model.init_with_output)(jax.random.key(0), x, t)
  assert jnp.max(jnp.abs(out)) < 1e-3


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('size', [(8, 8), (6, 10), (2, 2)])
def test_gray_and_rgb_of_any_size_that_halves(channels, size):
  model = unet.UNet(**SMALL | {'out_channels': channels})
  x, t = images(size=size, channels=channels), jnp.array([1, 2])
  out, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), x, t)
  assert out.shape == x.shape
  assert out.dtype == jnp.float32


@pytest.mark.parametrize('shape', [(1, 7, 8, 3), (1, 8, 9, 3), (8, 8, 3)])
def test_sizes_that_do_not_halve_are_refused(shape, monkeypatch):
  # As where nobody checks the signature.
  monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)
  with pytest.raises(ValueError, match='multiples of 2'):
    unet.UNet(**SMALL).init(
      jax.random.key(0), jnp.zeros(shape), jnp.ones(1, int)
    )


def test_no_example_leaks_into_another():
  model, x, t = unet.UNet(**SMALL), images(4), jnp.array([1, 5, 9, 1000])
  v, keys = variables(model, x), jax.random.split(jax.random.key(3), 4)
  f = lambda x: model.apply(v, x, t, keys=keys)  # noqa: E731
  reaches = jax.jacfwd(lambda s: f(x * s[:, None, None, None]).sum((1, 2, 3)))
  j = jax.jit(reaches)(jnp.ones(4))
  np.testing.assert_array_equal(j - jnp.diag(jnp.diag(j)), 0)
  assert np.all(np.diag(j) != 0)


def test_the_output_depends_on_t():
  model, x = unet.UNet(**SMALL), images(1).repeat(2, axis=0)
  a, b = apply(model, variables(model, x), x, jnp.array([1, 2]))
  assert jnp.max(jnp.abs(a - b)) > 1e-3


@functools.cache
def half_dropped():
  """(images, t, keys) -> output, of a network with a dropout of a half."""
  model = unet.UNet(**SMALL, dropout=0.5)
  v = variables(model, images(4))
  return jax.jit(lambda x, t, keys: model.apply(v, x, t, keys=keys))


def test_dropout_is_off_when_sampling_and_differs_by_key_when_training():
  x, t = images(4), jnp.ones(4, int)

  def out(seed):
    return half_dropped()(x, t, jax.random.split(jax.random.key(seed), 4))

  sampling = half_dropped()(x, t, None)
  np.testing.assert_array_equal(out(0), out(0))
  assert jnp.max(jnp.abs(out(0) - out(1))) > 1e-3
  assert jnp.max(jnp.abs(out(0) - sampling)) > 1e-3


def test_dropout_of_an_example_follows_its_key_and_not_its_place():
  x, t = images(4), jnp.ones(4, int)
  keys = jax.random.split(jax.random.key(0), 4)
  out = half_dropped()(x, t, keys)
  turned = half_dropped()(x[::-1], t, keys[::-1])
  np.testing.assert_allclose(turned[::-1], out, atol=1e-5)


def test_dropout_keeps_the_mean():
  x, keys = jnp.ones((16, 64, 64, 1)), jax.random.split(jax.random.key(0), 16)
  y = layers.dropout(keys, x, 0.3)
  kept = (y != 0).mean()
  error = (0.3 * 0.7 / x.size) ** 0.5
  assert abs(kept - 0.7) < 5 * error
  np.testing.assert_allclose(y[y != 0], 1 / 0.7, rtol=1e-6)


def test_blocks_and_examples_drop_different_things():
  keys = []
  whole = layers.dropout

  def watched(k, x, rate):
    keys.append(k)
    return whole(k, x, rate)

  model = unet.UNet(**SMALL | {'blocks': 1}, dropout=0.5)
  x, t = images(2), jnp.ones(2, int)
  v = variables(model, x)

  @jax.jit
  def of_blocks(of_examples):
    model.apply(v, x, t, keys=of_examples)
    return jax.random.key_data(jnp.stack(keys))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layers, 'dropout', watched)
    data = of_blocks(jax.random.split(jax.random.key(0), 2)).reshape(-1, 2)
  # Two levels, one block down and two up; two in the middle.
  assert len(np.unique(data, axis=0)) == 8 * 2


def test_bf16_computes_roughly_the_same_with_float32_parameters():
  x, t = images(), jnp.array([3, 700])
  exact = unet.UNet(**SMALL)
  rough = unet.UNet(**SMALL, dtype=jnp.bfloat16)
  v = variables(exact, x)
  kinds = {p.dtype for p in jax.tree.leaves(shapes(rough))}
  assert kinds == {jnp.dtype('float32')}
  a, b = apply(exact, v, x, t), apply(rough, v, x, t)
  assert b.dtype == jnp.float32
  # bfloat16 has 8 bits: 0.4% a rounding, over some 10 layers.
  assert jnp.max(jnp.abs(a - b)) < 0.1 * jnp.std(a)
  assert jnp.max(jnp.abs(a - b)) > 1e-5  # it is not float32 in disguise


def test_remat_changes_no_parameter_and_no_gradient():
  x, t, level = images(), jnp.array([3, 700]), SMALL | {'multipliers': (1,)}
  plain, remat = unet.UNet(**level), unet.UNet(**level, remat=True)
  v, keys = variables(plain, x), jax.random.split(jax.random.key(0), 2)

  def gradient(model):
    loss = lambda v: jnp.sum(model.apply(v, x, t, keys=keys) ** 2)  # noqa: E731
    return jax.jit(jax.grad(loss))(v)

  a, b = gradient(plain), gradient(remat)
  largest = max(jnp.abs(p).max() for p in jax.tree.leaves(a))
  # Rounding, of sums whose terms are as large as the largest gradients.
  chex.assert_trees_all_close(a, b, rtol=1e-7, atol=1e-6 * float(largest))


def configured(**changes):
  c = base.get_config()
  recipe.override(c, {k.replace('__', '.'): v for k, v in changes.items()})
  return build.network(c)


def test_attention_is_by_side_in_pixels():
  assert configured().attention == (1,)
  assert configured(data__image_size='64').attention == (2,)
  assert configured(data__image_size='(32, 64)').attention == (1,)
  assert configured(model__attention='(8, 32)').attention == (0, 2)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(data__image_size='30'), '30x30 is not a multiple of 8'),
    (dict(data__image_size='(32, 36)'), '32x36 is not a multiple of 8'),
    (dict(model__channels='100'), 'groups=32 does not divide'),
    (dict(model__name='unett'), "did you mean 'unet'"),
  ],
)
def test_what_cannot_be_built_is_a_line_for_the_user(changes, message):
  with pytest.raises(build.errors.UserError, match=message):
    configured(**changes)


def test_patches_come_back_and_hold_neighbours():
  x = jnp.arange(2.0 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  patches = layers.to_patches(x, 2)
  assert patches.shape == (2, 2, 3, 12)
  np.testing.assert_array_equal(
    np.sort(patches[1, 0, 2]), np.sort(x[1, :2, 4:].ravel())
  )
  np.testing.assert_array_equal(layers.from_patches(patches, 2), x)


def test_patches_change_what_the_network_costs_and_not_what_it_takes():
  x, t = images(size=(16, 8)), jnp.ones(2, int)
  flops = {}
  for patch in (1, 2):
    model = unet.UNet(**SMALL, patch=patch)
    params = variables(model, x)
    compiled = jax.jit(model.apply).lower(params, x, t).compile()
    flops[patch] = compiled.cost_analysis()['flops']
    assert compiled(params, x, t).shape == x.shape
  assert flops[2] < 0.4 * flops[1]


def test_a_patch_must_divide_the_image():
  c = recipe.load('configs/folder.py')
  c.model.patch = 3
  with pytest.raises(errors.UserError, match='not a multiple of 24'):
    build.network(c)


def test_upsampling_is_nearest_neighbour_and_a_convolution():
  x = images(size=(6, 4), channels=8)
  plain = nn.Conv(8, (3, 3), padding=1)
  ours = layers.Conv(8, layers.init(), jnp.float32, layers.convolve_doubled)
  v = variables(plain, x.repeat(2, axis=1).repeat(2, axis=2))
  chex.assert_trees_all_equal_shapes_and_dtypes(
    v, jax.eval_shape(ours.init, jax.random.key(0), x)
  )

  def gradient(f):
    return jax.jit(jax.grad(lambda v, x: jnp.sum(jnp.sin(f(v, x))), (0, 1)))(
      v, x
    )

  doubled = lambda v, x: plain.apply(  # noqa: E731
    v, x.repeat(2, axis=1).repeat(2, axis=2)
  )
  np.testing.assert_allclose(ours.apply(v, x), doubled(v, x), atol=1e-5)
  # Sums of some 50 terms about 1, in another order.
  a, b = gradient(ours.apply), gradient(doubled)
  chex.assert_trees_all_close(a, b, rtol=1e-7, atol=2e-5)
