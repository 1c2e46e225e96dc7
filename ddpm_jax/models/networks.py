"""The networks that a recipe can name: `config.model.name` is in `__all__`.

Each is called with the image size, (height, width) or () for points, and the
channels of its output, and takes the keys of `config.model` that it reads.
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
  """The U-Net of a recipe, for images of (height, width) pixels.

  `attention` holds sides in pixels of a level: one whose shorter side is among
  them has attention after every block. The other keys are those of `UNet`.

  Raises:
    ValueError: if the image cannot be halved so often, or `groups` does not
      divide the channels.
  """
  if len(image_size) != 2:
    raise ValueError('config.model.name=unet is for images; points take mlp')
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
      f'config.model.groups={groups} does not divide the channels '
      f'{[channels * m for m in multipliers]} of every level'
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
  """The MLP of a recipe, for points of `image_channels` coordinates.

  Raises:
    ValueError: if the data are images.
  """
  if image_size != ():
    raise ValueError(
      'config.model.name=mlp is for points (config.data.image_size=()); '
      'images take unet'
    )
  return mlps.MLP(image_channels, channels, blocks)
