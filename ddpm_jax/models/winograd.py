"""Winograd's convolutions, for CPUs.

F(2x2, 3x3) of Winograd 1980 (Lavin & Gray 2016, "Fast algorithms for
convolutional neural networks") computes 2x2 output pixels with 16 products
instead of 36. All of them are one matrix product, as are their gradients. The
result is exact up to rounding. On each axis, with pairs of pixels x_2i, x_2i+1
and taps a, b, c,

  m_0 = (x_2i-1 - x_2i+1) a
  m_1 = (x_2i + x_2i+1) (a + b + c) / 2        y_2i   = m_0 + m_1 + m_2
  m_2 = (x_2i+1 - x_2i) (a - b + c) / 2        y_2i+1 = m_1 - m_2 - m_3
  m_3 = (x_2i - x_2i+2) c

GPUs and TPUs use their own convolutions.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ddpm_jax.models import precision

Image = precision.Image
Kernel = precision.Kernel

# Smaller outputs and fewer channels are too little work to gain anything.
LEAST_SIDE, LEAST_CHANNELS = 8, 64
# Number of 2x2 squares processed at once without gradients: fewer do not pay
# for the transform of the kernel, more do not fit in the cache.
LEAST_PAIRS, MOST_PAIRS = 256, 1024


def is_large(x: Image, kernel: Kernel, times: int) -> bool:
  """Whether Winograd pays at `times` x's size; bfloat16 sums would round."""
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
  """x[i - n] at i, and 0 outside."""
  padding = [(0, 0, 0)] * x.ndim
  padding[axis] = (n, -n, 0)
  return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)


def _split(x: Array, n: int, axis: int) -> list[Array]:
  # The gradient of a split is one array; that of n slices is a sum of n.
  parts = jax.lax.split(x, (1,) * n, axis)
  return [part.squeeze(axis) for part in parts]


def _of_pixels(x: Array, axis: int) -> Array:
  """The pixels' factors in m_0..m_3: (..., 2n, ...) -> (4, ..., n, ...)."""
  pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
  even, odd = _split(pairs, 2, axis + 1)
  before, after = _shift(odd, 1, axis), _shift(even, -1, axis)
  return jnp.stack([before - odd, even + odd, odd - even, even - after])


def _of_taps(kernel: Array, axis: int) -> Array:
  """The taps' factors in m_0..m_3: (..., 3, ...) -> (4, ...)."""
  a, b, c = _split(kernel, 3, axis)
  return jnp.stack([a, (a + b + c) / 2, (a - b + c) / 2, c])


def _to_pixels(m: Array, axis: int) -> Array:
  """y from m: (4, ..., n, ...) -> (..., n, 2, ...), with the 2 at `axis`."""
  m_0, m_1, m_2, m_3 = _split(m, 4, 0)
  return jnp.stack([m_0 + m_1 + m_2, m_1 - m_2 - m_3], axis)


def _of_doubled(x: Array, axis: int) -> Array:
  """`_of_pixels` of x upsampled: x_2i = x_2i+1, so that m_2 is left out."""
  before, after = _shift(x, 1, axis), _shift(x, -1, axis)
  return jnp.stack([before - x, x, x - after])


def _of_taps_for_doubled(kernel: Array, axis: int) -> Array:
  a, b, c = _split(kernel, 3, axis)
  return jnp.stack([a, a + b + c, c])


def _to_doubled(m: Array, axis: int) -> Array:
  m_0, m_1, m_3 = _split(m, 3, 0)
  return jnp.stack([m_0 + m_1, m_1 - m_3], axis)


Map = Callable[[Array, int], Array]  # along an axis


# The transformed pixels are larger than x: gradients recompute them.
@functools.partial(jax.checkpoint, static_argnums=(2, 3, 4))
def _by_products(
  x: Image, kernel: Kernel, of_pixels: Map, of_taps: Map, back: Map
) -> Float[Array, 'B h w K']:
  """Transforms one axis after the other, with one matrix product for all."""
  C, K = kernel.shape[2:]
  v = of_pixels(of_pixels(x, 1), 3)  # (n, n, B, H', W', C), W before H
  u = of_taps(of_taps(kernel, 0), 1)  # (n, n, C, K)
  n, _, B, H, W, _ = v.shape
  m = v.reshape(n * n, -1, C) @ u.reshape(n * n, C, K)
  y = back(m.reshape(n, n, B, H, W, K), 4)  # (n, B, H', W', 2, K)
  return back(y, 2).reshape(B, 2 * H, 2 * W, K)


def _winograd(x: Image, kernel: Kernel) -> Float[Array, 'B H W K']:
  y: Array = _by_products(x, kernel, _of_pixels, _of_taps, _to_pixels)
  return y


def convolve_doubled(x: Image, kernel: Kernel) -> Float[Array, 'B 2*H 2*W K']:
  """A convolution of x at twice its size (nearest neighbour)."""
  maps = _of_doubled, _of_taps_for_doubled, _to_doubled
  y: Array = _by_products(x, kernel, *maps)
  return y


def _winograd_in_parts(x: Image, kernel: Kernel) -> Float[Array, 'B H W K']:
  """Processes groups of images, one after another."""
  B, H, W, C = x.shape
  pairs = H * W // 4  # 2x2 pixels of an image
  sizes = (n for n in range(1, B // 2 + 1) if B % n == 0)
  n = max((n for n in sizes if n == 1 or n * pairs <= MOST_PAIRS), default=0)
  if n * pairs < LEAST_PAIRS:
    return precision.convolution(x, kernel)
  # Each part takes every (B/n)-th image, so that all devices have some of it.
  parts = x.reshape(n, B // n, H, W, C).swapaxes(0, 1)
  y: Array = jax.lax.map(lambda x: _winograd(x, kernel), parts)
  return y.swapaxes(0, 1).reshape(B, H, W, -1)


# If x is not kept for gradients, XLA fuses its computation into the pairs, four
# times over, which costs what the products save. A loop prevents that.
convolve = jax.custom_jvp(_winograd_in_parts)


@convolve.defjvp
def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
  return jax.jvp(_winograd, primals, tangents)
