"""Networks by name: `config.model.name` names one of `__all__`.

Each takes the image size, (height, width) or () for points; the number of
output channels; and, as keywords, the keys of `config.model` that it uses.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from ddpm_jax.models import mlp as mlps
from ddpm_jax.models import unet as unets

__all__ = ['mlp', 'unet']


def unet(
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
) -> unets.UNet:
  """Builds the U-Net of a recipe, for images of (height, width) pixels.

  A level has attention after every block if its shorter side, in pixels, is in
  `attention`. The other keys are those of `UNet`.

  Raises:
    ValueError: If the image cannot be halved at every level, or `groups` does
      not divide the channels.
  """
  if len(image_size) != 2:
    raise ValueError('config.model.name=unet is for images; use mlp for points')
  factor = patch * 2 ** (len(multipliers) - 1)
  if any(side % factor for side in image_size):
    raise ValueError(
      f'image size {image_size[0]}x{image_size[1]} is not a multiple of '
      f'{factor}, which {len(multipliers)} levels of config.model.patch='
      f'{patch} need; change config.data.image_size, or give '
      'config.model.multipliers fewer entries'
    )
  if any(channels * m % groups for m in multipliers):
    raise ValueError(
      f'config.model.groups={groups} does not divide the channels of every '
      f'level, {[channels * m for m in multipliers]}'
    )
  sides = [
    min(image_size) // patch // 2**level for level in range(len(multipliers))
  ]
  return unets.UNet(
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


def mlp(
  image_size: tuple[int, ...],
  image_channels: int,
  *,
  channels: int,
  blocks: int,
) -> mlps.MLP:
  """Builds the MLP of a recipe, for points of `image_channels` coordinates.

  Raises:
    ValueError: If the data are images.
  """
  if image_size != ():
    raise ValueError(
      'config.model.name=mlp is for points (config.data.image_size=()); '
      'use unet for images'
    )
  return mlps.MLP(image_channels, channels, blocks)
