"""Sampling and likelihood as functions of the weights, made from a recipe.

Jobs compile these functions for their devices. Row i of a result depends on the
seed and on `index[i]` alone, not on the other rows of the batch.
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
    images: uint8 (B, H, W, C), images; or float32 (B, D), points.
    x0_hats: (B, K, ...), K intermediate predictions of x_0, or None.
    bad_t: (B,), see `samplers.Sampled`.
  """

  images: jax.Array
  x0_hats: jax.Array | None
  bad_t: jax.Array


def rows(seed: int, index: np.ndarray, condition: Any = None) -> dict[str, Any]:
  """Returns the input `rows` of a `Draw`: arrays with one row per sample.

  The seed is an input, not a constant of the compiled program, so that another
  seed needs no new compilation.

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
  """Returns (keys (B,), x_T (B, ...)) of samples; `seed` is () or (B,)."""
  seeds = jnp.broadcast_to(jnp.asarray(seed, jnp.uint32), index.shape)
  keys = jax.vmap(
    lambda seed, i: jax.random.fold_in(build.key(seed, 'sample'), i)
  )(seeds, index)
  # Sampler steps fold in their t ≥ 1, so 0 is free for x_T.
  first = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
  return keys, process.normal(first, recipe.shape(config))


def drawn(config: ConfigDict, sampled: samplers.Sampled) -> Drawn:
  """Converts the sampler's result: [-1, 1] -> uint8 for images."""
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
  """Returns the recipe's sampler, a function to compile.

  Args:
    config: The recipe.
    snapshots: Number of intermediate predictions of x_0 to return.
    shard: Shards images (B, H, W, C) over devices.

  Returns:
    (params, rows) -> `Drawn`; see `rows`. Without a condition, a model of
    classes draws class index % classes.
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
    times: K decreasing times of the sampler's schedule, beginning at its last.
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
  """Returns (params, batch) -> `likelihood.Bound` of the images of a batch.

  Args:
    config: The recipe.
    seed: Seed of the times and the noise.
    estimate: (denoiser, keys, x0) -> the bound; by default `likelihood.bound`
      at `evaluate.draws` times.
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
