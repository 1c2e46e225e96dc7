"""The U-Net of Ho et al. 2020, section 4 and appendix B, and of their code.

Parameters and the statistics of norms are float32; `dtype` is that of
activations and products.
"""

import functools
import itertools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = jnp.dtype | type


def init(scale: float = 1.0) -> Callable:
  """Uniform of variance scale / mean(fan_in, fan_out)."""
  # The authors' code says 0 and means 1e-10.
  return nn.initializers.variance_scaling(
    max(scale, 1e-10), 'fan_avg', 'uniform'
  )


def time_embedding(t: jax.Array, width: int) -> jax.Array:
  """[sin(t ω) ‖ cos(t ω)], ω_i = 10000^(-i / (width/2 - 1)): (B, width)."""
  half = width // 2
  omega = jnp.exp(-jnp.log(1e4) * jnp.arange(half) / (half - 1))
  angle = t.astype(jnp.float32)[:, None] * omega
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)


def to_patches(x: jax.Array, side: int) -> jax.Array:
  """(B, H, W, C) -> (B, H/side, W/side, side² C)."""
  B, H, W, C = x.shape
  x = x.reshape(B, H // side, side, W // side, side, C)
  return x.swapaxes(2, 3).reshape(B, H // side, W // side, side**2 * C)


def from_patches(x: jax.Array, side: int) -> jax.Array:
  """The inverse of `to_patches`."""
  B, H, W, C = x.shape
  x = x.reshape(B, H, W, side, side, C // side**2)
  return x.swapaxes(2, 3).reshape(B, H * side, W * side, C // side**2)


def dropout(keys: jax.Array, x: jax.Array, rate: float) -> jax.Array:
  """Dropout by a key an example: (B,) keys, (B, ...) x.

  `nn.Dropout` draws one mask for the batch that it sees, which is not the same
  batch on one device and on eight.
  """
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(
    keys
  )
  return jnp.where(keep, x / (1 - rate), 0)


class GroupNorm(nn.Module):
  """`nn.GroupNorm` of images, by the sums of channels.

  Adding pixels before channels leaves the channels where they are: to reshape
  (..., C) to groups first moves all of x on a TPU, and is slower on a CPU.
  """

  groups: int
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    B, C = x.shape[0], x.shape[-1]
    scale = self.param('scale', nn.initializers.ones, (C,))
    bias = self.param('bias', nn.initializers.zeros, (C,))

    def mean(x: jax.Array) -> jax.Array:
      """Of pixels, then of the channels of a group: (B, C)."""
      x = jnp.mean(x, axis=(1, 2)).reshape(B, self.groups, -1)
      return jnp.repeat(x.mean(2), C // self.groups, axis=1)

    y = x.astype(jnp.float32)
    mu = mean(y)
    variance = jnp.maximum(mean(jnp.square(y)) - jnp.square(mu), 0)
    a = jax.lax.rsqrt(variance + 1e-6) * scale
    b = bias - mu * a
    return (y * a[:, None, None] + b[:, None, None]).astype(self.dtype)


class ResBlock(nn.Module):
  """norm, swish, conv, + time, norm, swish, dropout, conv; + shortcut."""

  channels: int
  groups: int
  dropout: float
  dtype: Dtype

  @nn.compact
  def __call__(
    self, x: jax.Array, temb: jax.Array, keys: jax.Array | None
  ) -> jax.Array:
    norm = functools.partial(GroupNorm, self.groups, self.dtype)
    conv = functools.partial(
      nn.Conv, self.channels, (3, 3), padding=1, dtype=self.dtype
    )
    dense = functools.partial(
      nn.Dense, self.channels, kernel_init=init(), dtype=self.dtype
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
  def __call__(self, x: jax.Array) -> jax.Array:
    B, H, W, C = x.shape
    dense = functools.partial(nn.Dense, C, dtype=self.dtype)
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
    self, x: jax.Array, states: jax.Array, mask: jax.Array
  ) -> jax.Array:
    B, H, W, C = x.shape
    dense = functools.partial(nn.Dense, C, dtype=self.dtype)
    h = GroupNorm(self.groups, self.dtype, name='norm')(x)
    q, k, v = (
      dense(kernel_init=init(), name=name)(of).reshape(
        B, -1, self.heads, C // self.heads
      )
      for name, of in (('q', h), ('k', states), ('v', states))
    )
    h = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None])
    return x + dense(kernel_init=init(0), name='out')(h.reshape(B, H, W, C))


def convolve(
  x: jax.Array, kernel: jax.Array, padding: Sequence[tuple[int, int]]
) -> jax.Array:
  return jax.lax.conv_general_dilated(
    *(x, kernel.astype(x.dtype), (1, 1), padding),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def of_doubled(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """A 3x3 convolution of x at twice its size (nearest neighbour)."""
  x = x.repeat(2, axis=1).repeat(2, axis=2)
  return convolve(x, kernel, ((1, 1), (1, 1)))


def of_doubled_in_quarters(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The same, of pixels that are not doubled first.

  Each of the four pixels that come of one sees 2x2 old ones, which is 16
  products where there were 36. For CPUs, where it takes 0.6 of the time; what
  puts the quarters together moves more bytes on a TPU than it saves.
  """
  B, H, W, C = x.shape

  def pairs(kernel: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Its taps on old pixels, for the first of two new ones and the second."""
    a, b, c = jnp.split(kernel, 3, axis)
    join = functools.partial(jnp.concatenate, axis=axis)
    return join([a, b + c]), join([a + b, c])

  quarters = [
    jnp.stack(
      [
        convolve(x, taps, ((1 - i, i), (1 - j, j)))
        for j, taps in enumerate(pairs(rows, 1))
      ],
      axis=3,
    )
    for i, rows in enumerate(pairs(kernel, 0))
  ]
  return jnp.stack(quarters, axis=2).reshape(B, 2 * H, 2 * W, C)


class Upsample(nn.Module):
  """Twice the size (nearest neighbour), then a 3x3 convolution."""

  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    C = x.shape[-1]
    kernel = self.param('kernel', init(), (3, 3, C, C))
    bias = self.param('bias', nn.initializers.zeros, (C,))
    y = jax.lax.platform_dependent(
      *(x.astype(self.dtype), kernel),
      cpu=of_doubled_in_quarters,
      default=of_doubled,
    )
    return y + bias.astype(self.dtype)


class UNet(nn.Module):
  """ε_θ(x_t, t) for images whose sides `patch` and the levels divide.

  Attributes:
    out_channels: of the output.
    channels: of the first level.
    multipliers: of `channels`, one a level; each level but the last halves.
    attention: the levels (0 is the full size) with attention after each block.
    blocks: residual blocks of a level going down; going up has one more.
    groups: of group normalisation; must divide every level's channels.
    dropout: rate, in training.
    dtype: of activations and products.
    remat: recompute each block in the backward pass, to save memory.
    patch: side of the squares of pixels that the first level has as one pixel
      of more channels (Hoogeboom et al. 2023, "simple diffusion").
  """

  out_channels: int
  channels: int = 128
  multipliers: Sequence[int] = (1, 2, 2, 2)
  attention: Sequence[int] = (1,)
  blocks: int = 2
  groups: int = 32
  dropout: float = 0.1
  dtype: Dtype = jnp.float32
  remat: bool = False
  patch: int = 1

  @nn.compact
  def __call__(
    self,
    x_t: jax.Array,
    t: jax.Array,
    context: Any = None,
    *,
    keys: jax.Array | None = None,
  ) -> jax.Array:
    """What the network makes of noisy images.

    Args:
      x_t: (B, H, W, C).
      t: (B,) in 1..T.
      context: what a condition says, a `condition.Context`.
      keys: (B,), of the dropout of each example; None is without dropout.

    Returns:
      (B, H, W, out_channels), float32.

    Raises:
      ValueError: if H or W cannot be halved often enough.
    """
    levels = range(len(self.multipliers))
    factor = self.patch * 2 ** (len(levels) - 1)
    if x_t.ndim != 4 or x_t.shape[1] % factor or x_t.shape[2] % factor:
      raise ValueError(
        f'images {x_t.shape} are not (B, H, W, C) with H and W multiples of '
        f'{factor}, as {len(levels)} levels of patch {self.patch} need'
      )
    # One call that draws a key for every block compiles faster than one each.
    drops: Any = itertools.repeat(None)
    if keys is not None and self.dropout:
      n = len(levels) * (2 * self.blocks + 1) + 2
      drops = iter(jax.vmap(lambda k: jax.random.split(k, n))(keys).T)
    block = nn.remat(ResBlock) if self.remat else ResBlock
    conv = functools.partial(
      nn.Conv, kernel_size=(3, 3), padding=1, dtype=self.dtype
    )

    def res(h: jax.Array, level: int, name: str, attend: bool) -> jax.Array:
      channels = self.channels * self.multipliers[level]
      h = block(channels, self.groups, self.dropout, self.dtype, name=name)(
        h, temb, next(drops)
      )
      if attend:
        h = Attention(self.groups, self.dtype, name=f'{name}_attention')(h)
      if attend and context is not None and context.states is not None:
        h = CrossAttention(self.groups, self.dtype, name=f'{name}_condition')(
          h, context.states, context.mask
        )
      return h

    # The network was published with times from 0: it is told t - 1.
    temb = time_embedding(t - 1, self.channels)
    dense = functools.partial(
      nn.Dense, 4 * self.channels, kernel_init=init(), dtype=self.dtype
    )
    temb = dense(name='time_2')(nn.swish(dense(name='time_1')(temb)))
    if context is not None:
      temb += dense(name='condition')(context.pooled)

    h = to_patches(x_t, self.patch)
    h = conv(self.channels, kernel_init=init(), name='conv_in')(h)
    skips = [h]
    for level in levels:
      for i in range(self.blocks):
        h = res(h, level, f'down_{level}_{i}', level in self.attention)
        skips.append(h)
      if level != levels[-1]:
        h = nn.Conv(
          h.shape[-1],
          (3, 3),
          strides=2,
          padding=((0, 1), (0, 1)),
          kernel_init=init(),
          dtype=self.dtype,
          name=f'downsample_{level}',
        )(h)
        skips.append(h)

    h = res(h, levels[-1], 'middle_0', attend=True)
    h = res(h, levels[-1], 'middle_1', attend=False)

    for level in reversed(levels):
      for i in range(self.blocks + 1):
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = res(h, level, f'up_{level}_{i}', level in self.attention)
      if level != 0:
        h = Upsample(self.dtype, name=f'upsample_{level}')(h)

    h = GroupNorm(self.groups, self.dtype, name='norm')(h)
    outputs = self.out_channels * self.patch**2
    h = conv(outputs, kernel_init=init(0), name='conv_out')(nn.swish(h))
    return from_patches(h, self.patch).astype(jnp.float32)


def build(
  image_size: tuple[int, ...],
  image_channels: int,
  *,
  channels: int,
  multipliers: Sequence[int],
  blocks: int,
  attention: Sequence[int],
  groups: int,
  dropout: float,
  dtype: str,
  remat: bool,
  patch: int,
) -> UNet:
  """The U-Net of a recipe, for images of (height, width) pixels.

  `attention` holds sides in pixels of a level: one whose shorter side is among
  them has attention after every block. The other keys are those of `UNet`.

  Raises:
    ValueError: if the image cannot be halved so often, `groups` does not divide
      the channels, or `dtype` is unknown.
  """
  if len(image_size) != 2:
    raise ValueError('model.name=unet is for images; points take mlp')
  if patch < 1:
    raise ValueError(f'model.patch={patch} must be at least 1')
  factor = patch * 2 ** (len(multipliers) - 1)
  if any(side % factor for side in image_size):
    raise ValueError(
      f'image size {image_size[0]}x{image_size[1]} is not a multiple of '
      f'{factor}, which {len(multipliers)} levels of model.patch={patch} need; '
      'change data.image_size, or give model.multipliers fewer entries'
    )
  if any(channels * m % groups for m in multipliers):
    raise ValueError(
      f'model.groups={groups} does not divide the channels '
      f'{[channels * m for m in multipliers]} of every level'
    )
  if dtype not in ('float32', 'bfloat16'):
    raise ValueError(f'model.dtype={dtype!r} is not float32 or bfloat16')
  sides = [
    min(image_size) // patch // 2**level for level in range(len(multipliers))
  ]
  return UNet(
    out_channels=image_channels,
    channels=channels,
    multipliers=tuple(multipliers),
    attention=tuple(i for i, side in enumerate(sides) if side in attention),
    blocks=blocks,
    groups=groups,
    dropout=dropout,
    dtype=jnp.dtype(dtype),
    remat=remat,
    patch=patch,
  )
