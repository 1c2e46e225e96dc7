"""Matrix products and convolutions with float32 results."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

Image = Float[Array, 'B H W C']
Kernel = Float[Array, '3 3 C K']
# (x, kernel, dtype of the result) -> their product.
Product = Callable[[Array, Array, Any], Array]


def in_float32(product: Product, x: Array, kernel: Array) -> Array:
  """product(x, kernel), with factors in x's dtype and a float32 result.

  In bfloat16, the product is rounded to bfloat16 before the cast, except on a
  TPU under differentiation. There it is float32, and so are the gradients of
  kernels: devices can add them up in one sum with those of norms and biases,
  not in one sum per dtype. On a GPU, convolutions would have to convert their
  factors, and without gradients a float32 product would write more bytes.
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
  y: Array = jax.lax.platform_dependent(x, kernel, tpu=tpu, default=default)
  return y


def convolution(
  x: Image,
  kernel: Kernel,
  dtype: Any = None,
  stride: int = 1,
  zeros: tuple[int, int] = (1, 1),
) -> Float[Array, 'B H//{stride} W//{stride} K']:
  """3x3 convolution of x, padded with `zeros` (before, after) on each axis."""
  return jax.lax.conv_general_dilated(
    *(x, kernel, (stride, stride), (zeros, zeros)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    preferred_element_type=dtype,
  )


def convolution_doubled(
  x: Image, kernel: Kernel, dtype: Any = None
) -> Float[Array, 'B 2*H 2*W K']:
  """`convolution` after upsampling x by 2 (nearest neighbour)."""
  return convolution(x.repeat(2, axis=1).repeat(2, axis=2), kernel, dtype)


def convolution_halved(
  x: Image, kernel: Kernel, dtype: Any = None
) -> Float[Array, 'B H//2 W//2 K']:
  """`convolution` with stride 2, zero-padded below and right."""
  return convolution(x, kernel, dtype, 2, (0, 1))


def matmul(x: Array, kernel: Array, dtype: Any = None) -> Array:
  """x @ kernel."""
  return jnp.matmul(x, kernel, preferred_element_type=dtype)
