"""A multilayer perceptron, for points."""

import flax.linen as nn
from jax import Array
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Int
from jaxtyping import Key

from ddpm_jax.models import layers


class MLP(nn.Module):
  """ε_θ(x_t, t) for points of a few coordinates.

  Attributes:
    out_channels: Number of coordinates of the output.
    channels: Width of every hidden layer.
    blocks: Number of hidden layers; each takes the time as input.
  """

  out_channels: int
  channels: int = 128
  blocks: int = 3

  @nn.compact
  def __call__(
    self,
    x_t: Float[Array, 'B D'],
    t: Int[Array, 'B'],
    *,
    keys: Key[Array, 'B'] | None = None,
  ) -> Float32[Array, 'B {self.out_channels}']:
    """Returns the network's output for x_t, at t in 1..T."""
    del keys  # no dropout
    temb = layers.time_embedding(t - 1, self.channels)
    temb = nn.swish(nn.Dense(self.channels)(temb))
    h = nn.Dense(self.channels)(x_t)
    for _ in range(self.blocks):
      h += nn.Dense(self.channels)(nn.swish(h + nn.Dense(self.channels)(temb)))
    return nn.Dense(self.out_channels)(nn.swish(h))
