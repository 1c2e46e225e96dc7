"""A network in Inception's place, for what is not about its features."""

import flax.linen as nn
import jax

from ddpm_jax import main
from ddpm_jax.metrics import inception


class Inception(nn.Module):
  """Features of the same shapes, of the pixels of 17 x 17 squares.

  Its layers are named and shaped so that `inception.from_torch` reads them.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> inception.Features:
    x = nn.avg_pool(x, (17, 17), (17, 17))
    x = nn.relu(nn.Conv(7, (1, 1), name='first')(x))
    spatial = x.reshape(len(x), -1)
    x = nn.avg_pool(x, (4, 4), (4, 4)).reshape(len(x), 1, 1, -1)
    pool = nn.relu(nn.Conv(2048, (1, 1), name='second')(x))[:, 0, 0]
    fc = nn.Dense(inception.CLASSES, use_bias=False, name='fc')
    return inception.Features(pool, spatial, fc(pool))


if __name__ == '__main__':
  # The program, with this network.
  inception.Inception = Inception
  main.main()
