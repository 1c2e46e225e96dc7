"""How noisy the gradients of the losses of the notes are, beside `simple`.

  python -m benchmarks.loss_noise runs/digits [STEP]

For each loss: the variance of the gradient of a batch of 64, over the square of
its mean, with t uniform and the weights of a run as they were at a step (the
oldest that is kept, if none is named). Adam takes any scale out of a gradient,
so that this is what the losses differ in. It counts in examples too: times 64
it is the batch at which noise and gradient are as large (McCandlish et al.
2018, "simple noise scale").
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax.diffusion import losses
from ddpm_jax.diffusion import pixels
from ddpm_jax.storage import checkpoint

LOSSES = ('simple', 'one_noise', 'two_noise', 'x_prev')
BATCHES, SIZE = 256, 64


def main() -> None:
  folder = pathlib.Path(sys.argv[1])
  known = checkpoint.steps(folder / 'checkpoints')
  step = int(sys.argv[2]) if len(sys.argv) > 2 else known[0]
  config = recipe.resolve(None, folder, {'sampler.weights': 'raw'})
  mesh = build.mesh(config)
  _, step, params = runs.restore(config, mesh, folder, step)
  module, source = build.network(config), dataset.source(config)
  schedule = build.schedule(config)
  T = config.schedule.T

  def gradient(name: str, key: jax.Array, images: jax.Array) -> jax.Array:
    k_t, k_eps = jax.random.split(key)
    t = jax.random.randint(k_t, (SIZE,), 1, T + 1)
    keys = jax.random.split(k_eps, SIZE)

    def loss(params):
      denoiser = build.denoiser(config, schedule, build.applied(module, params))
      x0 = pixels.to_float(images)
      return getattr(losses, name)(denoiser, keys, x0, t).mean()

    leaves = jax.tree.leaves(jax.grad(loss)(params))
    return jnp.concatenate([leaf.ravel() for leaf in leaves])

  rng = np.random.default_rng(0)
  index = rng.integers(0, len(source), (BATCHES, SIZE)).astype(np.int32)
  print(f'step {step}, {BATCHES} batches of {SIZE}')
  for name in LOSSES:
    one = jax.jit(lambda key, images, name=name: gradient(name, key, images))
    every = np.stack(
      [
        one(jax.random.key(i), source.gather(rows)['image'])
        for i, rows in enumerate(index)
      ]
    )
    variance = every.var(0, ddof=1).sum()
    mean = np.square(every.mean(0)).sum() - variance / BATCHES
    print(f'{name:10} variance of a batch / mean² = {variance / mean:.2f}')


if __name__ == '__main__':
  main()
