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


def noise(
  config: ConfigDict, seed: int, index: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns (keys, x_T) of the samples `index` of a seed."""
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  keys = fold(build.key(seed, 'sample'), index)
  # Sampler steps fold in their t ≥ 1, so 0 is free for x_T.
  first = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
  return keys, process.normal(first, recipe.shape(config))


def index_and_condition(rows: Any) -> tuple[jax.Array, Any]:
  """Returns (index, condition or None) of rows; see `sampler`."""
  if isinstance(rows, dict):
    return rows['index'], rows.get('condition')
  return rows, None


def drawn(config: ConfigDict, sampled: samplers.Sampled) -> Drawn:
  """Converts the sampler's result: [-1, 1] -> uint8 for images."""
  x_0, x0_hats = sampled.x_0, sampled.x0_hats.swapaxes(0, 1)
  if recipe.image_size(config):
    x_0, x0_hats = pixels.to_uint8(x_0), pixels.to_uint8(x0_hats)
  return Drawn(x_0, x0_hats, sampled.bad_t)


def sampler(
  config: ConfigDict,
  seed: int,
  snapshots: int = 0,
  cut: Callable[[jax.Array], jax.Array] = lambda images: images,
) -> Draw:
  """Returns the recipe's sampler.

  Args:
    config: The recipe.
    seed: Seed of the samples.
    snapshots: Number of intermediate predictions of x_0 to return.
    cut: Splits images (B, H, W, C) over devices.

  Returns:
    (params, rows) -> `Drawn`. `rows` is {'index': (B,), 'condition': ...}, or
    the index alone; without a condition, sample i of a model of classes has the
    class i % classes.
  """
  made = build.sampler(config)

  def sample(params: Any, rows: Any) -> Drawn:
    index, condition = index_and_condition(rows)
    if condition is None and recipe.condition_kind(config) == 'label':
      condition = index % config.condition.classes
    keys, x_T = noise(config, seed, index)
    denoiser = made.denoiser(params, condition)
    return drawn(
      config,
      samplers.sample(
        *(made.step, denoiser, keys, cut(x_T)), snapshots=snapshots
      ),
    )

  return sample


def chain(config: ConfigDict, seed: int, times: Sequence[int]) -> Draw:
  """Returns the recipe's sampler, with x_t on the way in place of the samples.

  Args:
    config: The recipe.
    seed: Seed of the samples.
    times: K falling times of the sampler's schedule; the first is its last.

  Returns:
    (params, index (B,)) -> `Drawn`, whose images are x_t (B, K, ...), float32.
  """
  made = build.sampler(config)

  def sample(params: Any, index: jax.Array) -> Drawn:
    keys, x = noise(config, seed, index)
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
