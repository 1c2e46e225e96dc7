"""The linear maps of the U-Net, to float32.

They are 3x3 convolutions of images, with kernels (3, 3, C, C'), and products of
channels.

A CPU does large convolutions by F(2x2, 3x3) of Winograd 1980 (Lavin & Gray
2016, "Fast algorithms for convolutional neural networks"): every 2x2 pixels
come of 16 products in the place of 36, and all of them are one product of
matrices, as are their gradients. That is exact but for rounding. On each axis,
of pixels in pairs x_2i, x_2i+1 and of taps a, b, c,

  m_0 = (x_2i-1 - x_2i+1) a
  m_1 = (x_2i + x_2i+1) (a + b + c) / 2        y_2i   = m_0 + m_1 + m_2
  m_2 = (x_2i+1 - x_2i) (a - b + c) / 2        y_2i+1 = m_1 - m_2 - m_3
  m_3 = (x_2i - x_2i+2) c

GPUs and TPUs have convolutions of their own, and keep them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from jaxtyping import Float32

Image = Float[Array, 'B H W C']
Kernel = Float[Array, '3 3 C K']

# Smaller outputs and fewer channels are too little work to come out ahead.
LEAST_SIDE, LEAST_CHANNELS = 8, 64
# Of 2x2 pixels that are done at once without gradients: fewer do not pay for
# the transform of the kernel, more do not fit a cache.
LEAST_PAIRS, MOST_PAIRS = 256, 1024


def convolve(x: Image, kernel: Kernel) -> Float32[Array, 'B H W K']:
  """A convolution of x with zeros around."""
  return _by_platform(x, kernel, 1, _winograd_with_gradients, _plain)


def convolve_doubled(x: Image, kernel: Kernel) -> Float32[Array, 'B 2*H 2*W K']:
  """`convolve` of x at twice its size (nearest neighbour)."""
  return _by_platform(x, kernel, 2, _winograd_doubled, _plain_doubled)


def convolve_halved(
  x: Image, kernel: Kernel
) -> Float32[Array, 'B H//2 W//2 K']:
  """At every other pixel, with zeros below and right."""
  return _in_float32(_plain_halved, x, kernel)


def multiply(
  x: Float[Array, '*shape C'], kernel: Float[Array, 'C K']
) -> Float32[Array, '*shape K']:
  """x @ kernel."""
  return _in_float32(_matmul, x, kernel)


Product = Callable[[Array, Array, Any], Array]


def _in_float32(product: Product, x: Array, kernel: Array) -> Array:
  """product(x, kernel, dtype of the result), of factors in x's dtype.

  With gradients, on a TPU, that dtype is float32. So are then the gradients of
  kernels before devices add them up, with those of norms and biases, in one sum
  and not in one for each type. A GPU's convolutions would have to convert their
  factors; and what needs no gradients would write more.
  """
  kernel = kernel.astype(x.dtype)
  if x.dtype != jnp.bfloat16:
    return product(x, kernel, None)

  def default(x: Array, kernel: Array) -> Array:
    return product(x, kernel, None).astype(jnp.float32)

  def wide(x: Array, kernel: Array) -> Array:
    return product(x, kernel, jnp.float32)

  tpu = jax.custom_jvp(default)
  tpu.defjvp(lambda primals, tangents: jax.jvp(wide, primals, tangents))
  return jax.lax.platform_dependent(x, kernel, tpu=tpu, default=default)


def _by_platform(
  x: Image,
  kernel: Kernel,
  times: int,
  cpu: Callable[[Array, Array], Array],
  default: Product,
) -> Float32[Array, 'B {times}*H {times}*W K']:
  if not _is_large(x, kernel, times):
    return _in_float32(default, x, kernel)
  return jax.lax.platform_dependent(x, kernel, cpu=cpu, default=default)


def _plain(
  x: Image,
  kernel: Kernel,
  dtype: Any = None,
  stride: int = 1,
  zeros: tuple[int, int] = (1, 1),
) -> Float[Array, 'B H//{stride} W//{stride} K']:
  return jax.lax.conv_general_dilated(
    *(x, kernel, (stride, stride), (zeros, zeros)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    preferred_element_type=dtype,
  )


def _plain_doubled(
  x: Image, kernel: Kernel, dtype: Any = None
) -> Float[Array, 'B 2*H 2*W K']:
  return _plain(x.repeat(2, axis=1).repeat(2, axis=2), kernel, dtype)


def _plain_halved(
  x: Image, kernel: Kernel, dtype: Any = None
) -> Float[Array, 'B H//2 W//2 K']:
  return _plain(x, kernel, dtype, 2, (0, 1))


def _matmul(x: Array, kernel: Array, dtype: Any = None) -> Array:
  return jnp.matmul(x, kernel, preferred_element_type=dtype)


def _is_large(x: Image, kernel: Kernel, times: int) -> bool:
  """Whether it is worth while; in bfloat16 the sums would round too early."""
  sides = times * x.shape[1], times * x.shape[2]
  return (
    x.dtype == jnp.float32
    and all(side % 2 == 0 for side in sides)
    and min(sides) >= LEAST_SIDE
    and min(kernel.shape[2:]) >= LEAST_CHANNELS
  )


def _shift(
  x: Float[Array, '*shape'], n: int, axis: int
) -> Float[Array, '*shape']:
  """x[i - n] at i, and 0 where there is none."""
  padding = [(0, 0, 0)] * x.ndim
  padding[axis] = (n, -n, 0)
  return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)


def _split(x: Array, n: int, axis: int) -> list[Array]:
  # The gradient of a split is one array; of n slices it is a sum of n.
  parts = jax.lax.split(x, (1,) * n, axis)
  return [part.squeeze(axis) for part in parts]


def _of_pixels(x: Array, axis: int) -> Array:
  """(..., 2n, ...) -> (4, ..., n, ...)."""
  pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
  even, odd = _split(pairs, 2, axis + 1)
  before, after = _shift(odd, 1, axis), _shift(even, -1, axis)
  return jnp.stack([before - odd, even + odd, odd - even, even - after])


def _of_taps(kernel: Array, axis: int) -> Array:
  """(..., 3, ...) -> (4, ...)."""
  a, b, c = _split(kernel, 3, axis)
  return jnp.stack([a, (a + b + c) / 2, (a - b + c) / 2, c])


def _to_pixels(m: Array, axis: int) -> Array:
  """(4, ..., n, ...) -> (..., n, 2, ...), where axis is that of the 2."""
  m_0, m_1, m_2, m_3 = _split(m, 4, 0)
  return jnp.stack([m_0 + m_1 + m_2, m_1 - m_2 - m_3], axis)


def _of_doubled(x: Array, axis: int) -> Array:
  """Of (..., n, ...), where x_2i = x_2i+1, so that the third is 0: (3, ...)."""
  before, after = _shift(x, 1, axis), _shift(x, -1, axis)
  return jnp.stack([before - x, x, x - after])


def _of_taps_for_doubled(kernel: Array, axis: int) -> Array:
  a, b, c = _split(kernel, 3, axis)
  return jnp.stack([a, a + b + c, c])


def _to_doubled(m: Array, axis: int) -> Array:
  m_0, m_1, m_3 = _split(m, 3, 0)
  return jnp.stack([m_0 + m_1, m_1 - m_3], axis)


Parts = Callable[[Array, int], Array]


# What the products are of is larger than x: it is made again for gradients.
@functools.partial(jax.checkpoint, static_argnums=(2, 3, 4))
def _by_products(
  x: Image, kernel: Kernel, of_pixels: Parts, of_taps: Parts, back: Parts
) -> Float[Array, 'B h w K']:
  """One axis after the other, and one matrix product for all pairs."""
  C, K = kernel.shape[2:]
  v = of_pixels(of_pixels(x, 1), 3)  # (n, n, B, H', W', C), W before H
  u = of_taps(of_taps(kernel, 0), 1)  # (n, n, C, K)
  n, _, B, H, W, _ = v.shape
  m = v.reshape(n * n, -1, C) @ u.reshape(n * n, C, K)
  y = back(m.reshape(n, n, B, H, W, K), 4)  # (n, B, H', W', 2, K)
  return back(y, 2).reshape(B, 2 * H, 2 * W, K)


def _winograd(x: Image, kernel: Kernel) -> Float[Array, 'B H W K']:
  return _by_products(x, kernel, _of_pixels, _of_taps, _to_pixels)


def _winograd_doubled(x: Image, kernel: Kernel) -> Float[Array, 'B 2*H 2*W K']:
  return _by_products(x, kernel, _of_doubled, _of_taps_for_doubled, _to_doubled)


def _winograd_in_parts(x: Image, kernel: Kernel) -> Float[Array, 'B H W K']:
  """Some images after others."""
  B, H, W, C = x.shape
  pairs = H * W // 4  # 2x2 pixels of an image
  sizes = (n for n in range(1, B // 2 + 1) if B % n == 0)
  n = max((n for n in sizes if n == 1 or n * pairs <= MOST_PAIRS), default=0)
  if n * pairs < LEAST_PAIRS:
    return _plain(x, kernel)
  # Image 0 with image B/n, 2B/n...: with those of one device, if it can be.
  parts = x.reshape(n, B // n, H, W, C).swapaxes(0, 1)
  y = jax.lax.map(lambda x: _winograd(x, kernel), parts)
  return y.swapaxes(0, 1).reshape(B, H, W, -1)


# Where x is kept for no gradient, XLA computes it inside of the pairs, four
# times over, and that takes what the products save; but not inside of a loop.
_winograd_with_gradients = jax.custom_jvp(_winograd_in_parts)


@_winograd_with_gradients.defjvp
def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
  return jax.jvp(_winograd, primals, tangents)
