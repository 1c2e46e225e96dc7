"""A user's network: one convolution."""

import flax.linen as nn


class Net(nn.Module):
  channels: int

  @nn.compact
  def __call__(self, x_t, t, keys=None):
    return nn.Conv(self.channels, (3, 3))(x_t)


def network(image_size, image_channels):
  return Net(image_channels)
