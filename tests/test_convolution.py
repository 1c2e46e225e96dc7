"""Convolutions in fewer products are convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models import layers
from ddpm_jax.models import winograd
from ddpm_jax.parallel import meshes
from ddpm_jax.planning import hlo

pytestmark = pytest.mark.eight_devices

C = winograd.LEAST_CHANNELS


def doubled(x):
  return x.repeat(2, axis=1).repeat(2, axis=2)


def operands(size=(8, 16), channels=(C, C + 8), dtype=np.float64, images=2):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(images, *size, channels[0]))
  kernel = rng.normal(size=(3, 3, *channels)) / 3 / channels[0] ** 0.5
  return x.astype(dtype), kernel.astype(dtype)


def by_definition(x, kernel):
  """Nine shifted products, in NumPy and float64."""
  _, H, W, _ = x.shape
  x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return sum(
    x[:, i : i + H, j : j + W] @ kernel[i, j]
    for i in range(3)
    for j in range(3)
  )


def with_tangents(x, kernel):
  """As in training, which does it by products."""
  zeros = jnp.zeros_like(x), jnp.zeros_like(kernel)
  return jax.jvp(layers.convolve, (x, kernel), zeros)[0]


def exactly_doubled(x, kernel):
  return by_definition(doubled(x), kernel)


def exactly_halved(x, kernel):
  """With x_2i, x_2i+1 and x_2i+2."""
  return by_definition(x, kernel)[:, 1::2, 1::2]


FORMS = [
  (layers.convolve, by_definition),
  (with_tangents, by_definition),
  (layers.convolve_doubled, exactly_doubled),
]
BY_PRODUCTS = FORMS[1:]


def dots(f, *args):
  """How many products and convolutions the compiler is given."""
  text = jax.jit(f).lower(*args).as_text()
  return text.count('dot_general'), text.count('stablehlo.convolution')


@pytest.mark.parametrize(('f', 'exact'), FORMS)
@pytest.mark.parametrize(
  ('size', 'channels'),
  [
    ((8, 16), (C, C + 8)),  # by products
    ((8, 16), (3, C)),  # the others are plain
    ((7, 9), (C, C)),
    ((2, 2), (C, C)),
  ],
)
def test_all_forms_are_the_convolution(f, exact, size, channels):
  x, kernel = operands(size, channels)
  y = jax.jit(f)(jnp.float32(x), jnp.float32(kernel))
  # Some 600 terms of variance 1 in all, each rounded at 6e-8.
  np.testing.assert_allclose(y, exact(x, kernel), atol=1e-5)


@pytest.mark.parametrize(('f', 'exact'), BY_PRODUCTS)
def test_only_large_ones_in_float32_are_done_by_products(f, exact):
  products, _ = dots(f, *(jnp.float32(a) for a in operands()))
  assert products > 0
  for size, channels, dtype in (
    ((8, 16), (3, C), jnp.float32),
    ((8, 16), (C, 3), jnp.float32),
    ((2, 16), (C, C), jnp.float32),
    ((8, 16), (C, C), jnp.bfloat16),
  ):
    small = [a.astype(dtype) for a in operands(size, channels)]
    assert dots(f, *small)[0] == 0
  odd = [jnp.float32(a) for a in operands((9, 9))]
  assert (dots(f, *odd)[0] > 0) == (exact is exactly_doubled)


@pytest.mark.parametrize(
  ('images', 'at_once'), [(8, 4), (32, 16), (15, 5), (1, 0), (2, 0), (7, 0)]
)
def test_without_gradients_the_products_are_of_some_images_at_once(
  images, at_once
):
  """In a loop; where they are few, the convolution is as it is."""
  x, kernel = operands((16, 16), dtype=np.float32, images=images)
  jaxpr = str(jax.make_jaxpr(layers.convolve)(x, kernel))
  assert ('dot_general' in jaxpr) == (at_once > 0)
  assert (f'f32[{at_once},16,16,{C}]' in jaxpr) == (at_once > 0)
  y = jax.jit(layers.convolve)(x, kernel)
  exact = by_definition(np.float64(x), np.float64(kernel))
  np.testing.assert_allclose(y, exact, atol=1e-5)


def test_they_are_the_same_on_several_devices():
  mesh = meshes.make_mesh()
  x, kernel = operands((16, 16), dtype=np.float32, images=32)
  f = jax.jit(
    layers.convolve,
    in_shardings=(meshes.over_batch(mesh), meshes.replicated(mesh)),
    out_shardings=meshes.over_batch(mesh),
  )
  compiled = f.lower(x, kernel).compile()
  assert not hlo.of(compiled).collectives
  one = jax.jit(layers.convolve)(x, kernel)
  np.testing.assert_allclose(f(x, kernel), one, atol=1e-5)


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_accelerators_keep_their_own_convolutions(platform):
  many = operands((16, 16), images=8)
  shapes = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in many]
  for f, _ in FORMS:
    exported = jax.export.export(jax.jit(f), platforms=[platform])(*shapes)
    text = exported.mlir_module()
    assert 'stablehlo.convolution' in text
    assert 'dot_general' not in text


def test_at_half_the_size():
  x, kernel = operands()
  y = layers.convolve_halved(jnp.float32(x), jnp.float32(kernel))
  np.testing.assert_allclose(y, exactly_halved(x, kernel), atol=1e-5)


@pytest.mark.parametrize(
  'f',
  [
    layers.convolve,
    layers.convolve_doubled,
    layers.convolve_halved,
    layers.multiply,
  ],
)
def test_gradients_of_bfloat16_are_float32_on_a_tpu_before_they_are_added(f):
  x, kernel = operands()
  x, kernel = jnp.bfloat16(x), jnp.float32(kernel)
  if f is layers.multiply:
    kernel = kernel[0, 0]
  assert jax.eval_shape(f, x, kernel).dtype == jnp.float32
  gradient = jax.grad(lambda k: jnp.sum(jnp.sin(f(x, k))))
  for of, platform, dtype in (
    (gradient, 'tpu', 'f32'),
    (gradient, 'cuda', 'bf16'),
    (lambda k: f(x, k), 'tpu', 'bf16'),
  ):
    text = jax.export.export(jax.jit(of), platforms=[platform])(kernel)
    results = [
      line.rsplit('tensor<', 1)[1]
      for line in text.mlir_module().splitlines()
      if 'stablehlo.convolution' in line or 'stablehlo.dot_general' in line
    ]
    assert len(results) == (2 if of is gradient else 1)
    assert all(f'x{dtype}>' in result for result in results)


@pytest.mark.parametrize(('f', 'exact'), FORMS)
def test_the_gradients_are_those_of_the_convolution(f, exact):
  """Of <f(x, k), r>, which is linear in each: <∇_x, dx> = <f(dx, k), r>."""
  x, kernel = operands()
  dx, dk = operands()[0][::-1], operands()[1][::-1]
  r = np.random.default_rng(1).normal(size=exact(x, kernel).shape)
  of_x, of_kernel = jax.jit(
    jax.grad(lambda x, k: jnp.vdot(f(x, k), r.astype(np.float32)), (0, 1))
  )(jnp.float32(x), jnp.float32(kernel))
  # Sums of 18,000 and more terms about 1, which are some 130.
  for gradient, d, there in (
    (of_x, dx, exact(dx, kernel)),
    (of_kernel, dk, exact(x, dk)),
  ):
    here = np.vdot(np.float64(gradient), d)
    assert here == pytest.approx(np.vdot(there, r), abs=0.02)


@pytest.mark.parametrize(('f', 'exact'), FORMS)
def test_tangents_and_batches_of_batches(f, exact):
  """What figures, and others, ask of a network."""
  del exact
  x, kernel = (jnp.float32(a) for a in operands())

  @jax.jit
  def both(x):
    several = jax.vmap(f, (0, None))(jnp.stack([x, 2 * x]), kernel)
    return *jax.jvp(lambda x: f(x, kernel), (x,), (x,)), several

  y, along, several = both(x)
  np.testing.assert_allclose(y, along, atol=1e-5)
  np.testing.assert_allclose(several[1], 2 * y, atol=1e-5)


@pytest.mark.parametrize(
  ('f', 'times'), [(layers.convolve, 1), (layers.convolve_doubled, 4)]
)
def test_gradients_keep_no_more_than_the_operands(f, times):
  """What the products are of, 4 or 9 times x, is made again."""
  x, kernel = (jnp.float32(a) for a in operands(size=(32, 32)))
  kept = jax.eval_shape(lambda x, k: jax.vjp(f, x, k)[1], x, kernel)
  sizes = [leaf.size for leaf in jax.tree.leaves(kept)]
  assert max(sizes) <= max(times * x.size, kernel.size)


@pytest.mark.parametrize(('f', 'exact'), FORMS)
def test_a_batch_on_several_devices_moves_gradients_alone(f, exact):
  del exact
  x, kernel = (jnp.float32(a) for a in operands())
  x = jnp.concatenate([x] * 4)
  mesh = meshes.make_mesh()
  gradient = jax.jit(
    jax.grad(lambda k, x: jnp.sum(jnp.sin(f(x, k)))),
    in_shardings=(meshes.replicated(mesh), meshes.over_batch(mesh)),
    out_shardings=meshes.replicated(mesh),
  )
  compiled = gradient.lower(kernel, x).compile()
  assert set(hlo.of(compiled).collectives) == {'all-reduce'}
  one = jax.jit(jax.grad(lambda k: jnp.sum(jnp.sin(f(x, k)))))(kernel)
  # Sums of 1024 terms or more, of up to 300, in another order.
  np.testing.assert_allclose(gradient(kernel, x), one, atol=0.002)
