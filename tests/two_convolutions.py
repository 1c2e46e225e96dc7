"""A network that compiles at once: config.model.name=two_convolutions.network.

For runs whose network does not matter, in this process and in others.
"""

import flax.linen as nn
import jax.numpy as jnp

from ddpm_jax.models import layers


class Net(nn.Module):
  """Of images of so many channels; it takes a condition or none."""

  channels: int

  @nn.compact
  def __call__(self, x_t, t, context=None, keys=None):
    embedded = [layers.time_embedding(t, 8)]
    embedded += [] if context is None else [context.pooled]
    h = nn.Dense(8)(jnp.concatenate(embedded, axis=-1))[:, None, None]
    h += nn.Conv(8, (3, 3))(x_t)
    if keys is not None:
      h = layers.dropout(keys, h, 0.1)
    return nn.Conv(self.channels, (3, 3))(jnp.tanh(h))


def network(image_size, image_channels):
  del image_size
  return Net(image_channels)
