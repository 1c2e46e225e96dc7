"""The U-Net of Ho et al. 2020, section 4 and appendix B, and of their code."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Int
from jaxtyping import Key

from ddpm_jax.models import layers


class UNet(nn.Module):
  """ε_θ(x_t, t) for images; H and W are multiples of patch 2^(levels - 1).

  Attributes:
    out_channels: Channels of the output.
    channels: Channels of the first level.
    multipliers: Multiples of `channels`, one per level; each level but the last
      halves the image.
    attention: Levels (0 is the full size) with attention after each block.
    blocks: Residual blocks of a level going down; going up has one more.
    groups: Groups of group normalisation; must divide every level's channels.
    dropout: Dropout rate, in training.
    dtype: Type of activations and products.
    remat: Whether to recompute blocks in the backward pass, to save memory.
    patch: Side of the squares of pixels that become one pixel of the first
      level (Hoogeboom et al. 2023, "simple diffusion").
  """

  out_channels: int
  channels: int = 128
  multipliers: Sequence[int] = (1, 2, 2, 2)
  attention: Sequence[int] = (1,)
  blocks: int = 2
  groups: int = 32
  dropout: float = 0.1
  dtype: layers.Dtype = jnp.float32
  remat: bool = False
  patch: int = 1

  @nn.compact
  def __call__(
    self,
    x_t: Float[Array, 'B H W C'],
    t: Int[Array, 'B'],
    context: Any = None,
    *,
    keys: Key[Array, 'B'] | None = None,
  ) -> Float32[Array, 'B H W {self.out_channels}']:
    """Returns the network's output for x_t.

    Args:
      x_t: Noisy images.
      t: Times in 1..T.
      context: The encoded condition, a `condition.Context`, or None.
      keys: (B,), for dropout; None disables it.

    Raises:
      ValueError: If H or W cannot be halved often enough.
    """
    levels = range(len(self.multipliers))
    factor = self.patch * 2 ** (len(levels) - 1)
    if x_t.ndim != 4 or x_t.shape[1] % factor or x_t.shape[2] % factor:
      raise ValueError(
        f'images {x_t.shape} are not (B, H, W, C) with H and W multiples of '
        f'{factor}, as {len(levels)} levels of patch {self.patch} need'
      )
    # One split for all blocks compiles faster than one per block.
    drops: Any = itertools.repeat(None)
    if keys is not None and self.dropout:
      n = len(levels) * (2 * self.blocks + 1) + 2
      drops = iter(jax.vmap(lambda k: jax.random.split(k, n))(keys).T)
    block = nn.remat(layers.ResBlock) if self.remat else layers.ResBlock
    conv = functools.partial(layers.Conv, dtype=self.dtype)

    def res(
      h: Float[Array, 'B H W C'], level: int, name: str, attend: bool
    ) -> Float[Array, 'B H W K']:
      channels = self.channels * self.multipliers[level]
      h = block(channels, self.groups, self.dropout, self.dtype, name=name)(
        h, temb, next(drops)
      )
      if attend:
        h = layers.Attention(self.groups, self.dtype, name=f'{name}_attention')(
          h
        )
      if attend and context is not None and context.states is not None:
        h = layers.CrossAttention(
          self.groups, self.dtype, name=f'{name}_condition'
        )(h, context.states, context.mask)
      return h

    # Published weights expect times from 0: embed t - 1.
    temb = layers.time_embedding(t - 1, self.channels)
    dense = functools.partial(
      layers.Dense,
      4 * self.channels,
      kernel_init=layers.init(),
      dtype=self.dtype,
    )
    temb = dense(name='time_2')(nn.swish(dense(name='time_1')(temb)))
    if context is not None:
      temb += dense(name='condition')(context.pooled)

    h = layers.to_patches(x_t, self.patch)
    h = conv(self.channels, kernel_init=layers.init(), name='conv_in')(h)
    skips = [h]
    for level in levels:
      for i in range(self.blocks):
        h = res(h, level, f'down_{level}_{i}', level in self.attention)
        skips.append(h)
      if level != levels[-1]:
        h = layers.Downsample(
          h.shape[-1], layers.init(), self.dtype, name=f'downsample_{level}'
        )(h)
        skips.append(h)

    h = res(h, levels[-1], 'middle_0', attend=True)
    h = res(h, levels[-1], 'middle_1', attend=False)

    for level in reversed(levels):
      for i in range(self.blocks + 1):
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = res(h, level, f'up_{level}_{i}', level in self.attention)
      if level != 0:
        h = layers.Upsample(
          h.shape[-1], layers.init(), self.dtype, name=f'upsample_{level}'
        )(h)

    h = layers.GroupNorm(self.groups, self.dtype, name='norm')(h)
    outputs = self.out_channels * self.patch**2
    h = conv(outputs, kernel_init=layers.init(0), name='conv_out')(nn.swish(h))
    return layers.from_patches(h, self.patch).astype(jnp.float32)
