"""The layers of the U-Net of Ho et al. 2020, appendix B, and of their code.

Parameters and normalisation statistics are float32; `dtype` is the type of
activations and products.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Int
from jaxtyping import Key

from ddpm_jax.models import precision
from ddpm_jax.models import winograd

Dtype = jnp.dtype | type
# (key, shape) -> the initial values of a parameter.
Initializer = Callable[..., Array]
# (x, kernel) -> their product, such as `convolve`.
Product = Callable[[Array, Array], Array]


def init(scale: float = 1.0) -> Initializer:
  """Uniform, with variance scale / mean(fan_in, fan_out)."""
  # A scale of 0 means 1e-10, as in the authors' code.
  return nn.initializers.variance_scaling(
    max(scale, 1e-10), 'fan_avg', 'uniform'
  )


def multiply(
  x: Float[Array, '*shape C'], kernel: Float[Array, 'C K']
) -> Float32[Array, '*shape K']:
  """x @ kernel."""
  return precision.in_float32(precision.matmul, x, kernel)


def convolve(
  x: Float[Array, 'B H W C'], kernel: Float[Array, '3 3 C K']
) -> Float32[Array, 'B H W K']:
  """3x3 convolution of x, zero-padded."""
  if not winograd.is_large(x, kernel, 1):
    return precision.in_float32(precision.convolution, x, kernel)
  y: Array = jax.lax.platform_dependent(
    x, kernel, cpu=winograd.convolve, default=precision.convolution
  )
  return y


def convolve_doubled(
  x: Float[Array, 'B H W C'], kernel: Float[Array, '3 3 C K']
) -> Float32[Array, 'B 2*H 2*W K']:
  """`convolve` after upsampling x by 2 (nearest neighbour)."""
  if not winograd.is_large(x, kernel, 2):
    return precision.in_float32(precision.convolution_doubled, x, kernel)
  y: Array = jax.lax.platform_dependent(
    *(x, kernel),
    cpu=winograd.convolve_doubled,
    default=precision.convolution_doubled,
  )
  return y


def convolve_halved(
  x: Float[Array, 'B H W C'], kernel: Float[Array, '3 3 C K']
) -> Float32[Array, 'B H//2 W//2 K']:
  """3x3 convolution with stride 2, zero-padded below and right."""
  return precision.in_float32(precision.convolution_halved, x, kernel)


def time_embedding(
  t: Int[Array, 'B'], width: int
) -> Float32[Array, 'B {width}']:
  """[sin(t ω) ‖ cos(t ω)], ω_i = 10000^(-i / (width/2 - 1))."""
  half = width // 2
  omega = jnp.exp(-jnp.log(1e4) * jnp.arange(half) / (half - 1))
  angle = t.astype(jnp.float32)[:, None] * omega[None]
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)


def to_patches(
  x: Float[Array, 'B H W C'], side: int
) -> Float[Array, 'B H/{side} W/{side} C*{side}**2']:
  """Turns each square of side x side pixels into one pixel (space to depth)."""
  B, H, W, C = x.shape
  x = x.reshape(B, H // side, side, W // side, side, C)
  return x.swapaxes(2, 3).reshape(B, H // side, W // side, side**2 * C)


def from_patches(
  x: Float[Array, 'B H W C'], side: int
) -> Float[Array, 'B H*{side} W*{side} C/{side}**2']:
  """The inverse of `to_patches`."""
  B, H, W, C = x.shape
  x = x.reshape(B, H, W, side, side, C // side**2)
  return x.swapaxes(2, 3).reshape(B, H * side, W * side, C // side**2)


def dropout(
  keys: Key[Array, 'B'], x: Float[Array, 'B *shape'], rate: float
) -> Float[Array, 'B *shape']:
  """Dropout with one key per example.

  `nn.Dropout` draws one mask for the batch that it sees, which depends on the
  number of devices.
  """
  # Taking two elements of 16 bits from one draw is twice as fast on a CPU, but
  # joining them adds 9% to the bytes that a whole step moves on a TPU.
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(
    keys
  )
  return jnp.where(keep, x / (1 - rate), 0)


class GroupNorm(nn.Module):
  """`nn.GroupNorm` for images, by way of the means of channels.

  Averaging pixels before channels keeps the layout of x. Reshaping (..., C) to
  groups first would copy x on a TPU, and is slower on a CPU.
  """

  groups: int
  dtype: Dtype

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
    """Normalises the channels of each group of each image."""
    C = x.shape[-1]
    scale = self.param('scale', nn.initializers.ones, (C,))
    bias = self.param('bias', nn.initializers.zeros, (C,))
    y = x.astype(jnp.float32)
    mu = _mean(y, self.groups)
    square = _mean(jnp.square(y), self.groups)
    variance = jnp.maximum(square - jnp.square(mu), 0)
    a = jax.lax.rsqrt(variance + 1e-6) * scale[None]
    b = bias[None] - mu * a
    return (y * a[:, None, None] + b[:, None, None]).astype(self.dtype)


def _mean(x: Float32[Array, 'B H W C'], groups: int) -> Float32[Array, 'B C']:
  """Mean over pixels, then over the channels of a group."""
  B, _, _, C = x.shape
  x = jnp.mean(x, axis=(1, 2)).reshape(B, groups, -1)
  return jnp.repeat(x.mean(2), C // groups, axis=1)


class Dense(nn.Module):
  """A linear map of channels."""

  channels: int
  kernel_init: Initializer
  dtype: Dtype

  @nn.compact
  def __call__(
    self, x: Float[Array, '*shape C']
  ) -> Float[Array, '*shape {self.channels}']:
    """x times the kernel, plus the bias."""
    shape = (x.shape[-1], self.channels)
    return _with_bias(self, multiply, x, shape)


class Conv(nn.Module):
  """A 3x3 convolution, computed by `product`."""

  channels: int
  kernel_init: Initializer
  dtype: Dtype
  product: Product = convolve

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B H W C']
  ) -> Float[Array, 'B h w {self.channels}']:
    """The convolution of x, plus the bias."""
    shape = (3, 3, x.shape[-1], self.channels)
    return _with_bias(self, self.product, x, shape)


class Downsample(Conv):
  """A 3x3 convolution with stride 2."""

  product: Product = convolve_halved


class Upsample(Conv):
  """A 3x3 convolution after upsampling by 2."""

  product: Product = convolve_doubled


def _with_bias(
  module: Dense | Conv,
  product: Product,
  x: Float[Array, '... C'],
  shape: tuple[int, ...],
) -> Float[Array, '... K']:
  """product(x, kernel) + bias, in float32 until the final cast."""
  kernel = module.param('kernel', module.kernel_init, shape)
  bias = module.param('bias', nn.initializers.zeros, shape[-1:])
  y = product(x.astype(module.dtype), kernel)
  return (y + bias.reshape(*[1] * (y.ndim - 1), -1)).astype(module.dtype)


class ResBlock(nn.Module):
  """norm, swish, conv, + time, norm, swish, dropout, conv; + shortcut."""

  channels: int
  groups: int
  dropout: float
  dtype: Dtype

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B H W C'],
    temb: Float[Array, 'B D'],
    keys: Key[Array, 'B'] | None,
  ) -> Float[Array, 'B H W {self.channels}']:
    """Applies the block; `keys` (B,) are for dropout, None disables it."""
    norm = functools.partial(GroupNorm, self.groups, self.dtype)
    conv = functools.partial(Conv, self.channels, dtype=self.dtype)
    dense = functools.partial(
      Dense, self.channels, kernel_init=init(), dtype=self.dtype
    )
    h = conv(kernel_init=init(), name='conv_1')(
      nn.swish(norm(name='norm_1')(x))
    )
    h += dense(name='time')(nn.swish(temb))[:, None, None]
    h = nn.swish(norm(name='norm_2')(h))
    if keys is not None:
      h = dropout(keys, h, self.dropout)
    h = conv(kernel_init=init(0), name='conv_2')(h)
    if x.shape[-1] != self.channels:
      x = dense(name='shortcut')(x)
    return x + h


class Attention(nn.Module):
  """Every pixel attends to every other, with one head."""

  groups: int
  dtype: Dtype

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
    """x, plus what its pixels attend to."""
    B, H, W, C = x.shape
    dense = functools.partial(Dense, C, dtype=self.dtype)
    h = GroupNorm(self.groups, self.dtype, name='norm')(x)
    q, k, v = (
      dense(kernel_init=init(), name=name)(h).reshape(B, H * W, 1, C)
      for name in ('q', 'k', 'v')
    )
    # Softmax of the logits times C^-0.5, in float32.
    h = jax.nn.dot_product_attention(q, k, v).reshape(B, H, W, C)
    return x + dense(kernel_init=init(0), name='out')(h)


class CrossAttention(nn.Module):
  """Every pixel attends to the states of a condition."""

  groups: int
  dtype: Dtype
  heads: int = 4

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B H W C'],
    states: Float[Array, 'B L D'],
    mask: Bool[Array, 'B L'],
  ) -> Float[Array, 'B H W C']:
    """x, plus what its pixels attend to among the states."""
    B, H, W, C = x.shape
    dense = functools.partial(Dense, C, dtype=self.dtype)
    h = GroupNorm(self.groups, self.dtype, name='norm')(x)
    q, k, v = (
      dense(kernel_init=init(), name=name)(inputs).reshape(
        B, -1, self.heads, C // self.heads
      )
      for name, inputs in (('q', h), ('k', states), ('v', states))
    )
    h = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None])
    return x + dense(kernel_init=init(0), name='out')(h.reshape(B, H, W, C))
