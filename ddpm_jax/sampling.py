"""From a recipe to functions of weights, which jobs compile for their devices.

Row i of their results depends on a seed and on `index[i]` alone, not on the
other rows of the batch.
"""

import functools
import itertools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import recipe
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import pixels
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers

# (params, rows) -> `Drawn`.
Draw = Callable[[Any, Any], 'Drawn']


class Drawn(NamedTuple):
  """B samples.

  Attributes:
    images: uint8 (B, H, W, C); or points, float32 (B, D).
    x0_hats: (B, K, ...), the same of predictions on the way, or None.
    bad_t: (B,), see `samplers.Sampled`.
  """

  images: jax.Array
  x0_hats: jax.Array | None
  bad_t: jax.Array


def rows(seed: int, index: np.ndarray, condition: Any = None) -> dict[str, Any]:
  """The input of a `Draw`: arrays with a row for each sample.

  The seed is an input, not a constant of the program, so that another seed
  needs no compilation.

  Args:
    seed: Seed of the samples.
    index: int32 (B,), the numbers of the samples.
    condition: Arrays with B rows; None for none.
  """
  seeds = np.full(len(index), seed, np.uint32)
  made = {'seed': seeds, 'index': np.asarray(index, np.int32)}
  return made if condition is None else made | {'condition': condition}


def noise(
  config: ConfigDict, seed: int | jax.Array, index: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(keys (B,), x_T (B, ...)) of samples index (B,); seed is () or (B,)."""
  seeds = jnp.broadcast_to(jnp.asarray(seed, jnp.uint32), index.shape)
  keys = jax.vmap(
    lambda seed, i: jax.random.fold_in(build.key(seed, 'sample'), i)
  )(seeds, index)
  # Steps fold in their t ≥ 1, so 0 is left for x_T.
  first = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
  return keys, process.normal(first, recipe.shape(config))


def drawn(config: ConfigDict, sampled: samplers.Sampled) -> Drawn:
  """The samples as they are shown and written."""
  x_0, x0_hats = sampled.x_0, sampled.x0_hats.swapaxes(0, 1)
  if recipe.image_size(config):
    x_0, x0_hats = pixels.to_uint8(x_0), pixels.to_uint8(x0_hats)
  return Drawn(x_0, x0_hats, sampled.bad_t)


def sampler(
  config: ConfigDict,
  *,
  snapshots: int = 0,
  shard: Callable[[jax.Array], jax.Array] = lambda images: images,
) -> Draw:
  """The recipe's sampler as a function to compile.

  Args:
    config: The recipe.
    snapshots: Number of predictions x̂_0 to return on the way.
    shard: images (B, H, W, C) -> the same, sharded over devices.

  Returns:
    (params, rows) -> `Drawn`, for rows of `rows`. Without a condition, a model
    of classes draws class index % classes.
  """
  made = build.sampler(config)

  def sample(params: Any, rows: Any) -> Drawn:
    condition = rows.get('condition')
    if condition is None and recipe.condition_kind(config) == 'label':
      condition = rows['index'] % config.condition.classes
    keys, x_T = noise(config, rows['seed'], rows['index'])
    denoiser = made.denoiser(params, condition)
    return drawn(
      config,
      samplers.sample(
        *(made.step, denoiser, keys, shard(x_T)), snapshots=snapshots
      ),
    )

  return sample


def chain(config: ConfigDict, times: Sequence[int]) -> Draw:
  """(params, rows) -> `Drawn`, whose images are x_t (B, K, ...), not rounded.

  Args:
    config: The recipe.
    times: K decreasing times of the sampler's schedule, from the last one on.
  """
  made = build.sampler(config)

  def sample(params: Any, rows: Any) -> Drawn:
    keys, x = noise(config, rows['seed'], rows['index'])
    kept, previous, bad_t = [x], None, jnp.zeros(len(x), jnp.int32)
    denoiser = made.denoiser(params)
    for first, after in itertools.pairwise(times):
      x, seen, bad = samplers.sample(
        *(made.step, denoiser, keys, x),
        times=range(first, after, -1),
        previous=previous,
        snapshots=1,
      )
      previous = samplers.Previous(seen[0], jnp.full(len(x), after + 1))
      kept.append(x)
      bad_t = jnp.where(bad_t > 0, bad_t, bad)
    return Drawn(jnp.stack(kept, axis=1), None, bad_t)

  return sample


def bound(
  config: ConfigDict,
  seed: int,
  estimate: Callable[..., likelihood.Bound] | None = None,
) -> Callable[[Any, dict[str, jax.Array]], likelihood.Bound]:
  """(params, batch) -> `likelihood.Bound` of the images of a batch.

  Args:
    config: the recipe.
    seed: of times and noise.
    estimate: (denoiser, keys, x0) -> the bound; by default
      `likelihood.bound`, at as many times as the recipe says.
  """
  module, schedule = build.network(config), build.schedule(config)
  draws = config.evaluate.draws
  of = estimate or functools.partial(likelihood.bound, draws=draws)
  fold = jax.vmap(jax.random.fold_in, (None, 0))

  def evaluate(params: Any, batch: dict[str, jax.Array]) -> likelihood.Bound:
    keys = fold(build.key(seed, 'evaluate'), batch['index'])
    condition = build.condition(config, batch)
    network = build.applied(module, params, condition)
    denoiser = build.denoiser(config, schedule, network, sampling=True)
    return of(denoiser, keys, pixels.to_float(batch['image']))

  return evaluate
