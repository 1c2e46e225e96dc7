"""Conditional denoisers and classifier-free guidance.

Both functions take a denoiser whose network is (x_t, t, context) -> output, and
return one whose network is (x_t, t) -> output.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import shapes


def conditioned(
  denoiser: denoisers.Denoiser, context: Any
) -> denoisers.Denoiser:
  """Fixes the network's `context`: arrays with one row per example."""
  network: Any = denoiser.network
  return denoiser._replace(network=lambda x_t, t: network(x_t, t, context))


def guided(
  denoiser: denoisers.Denoiser,
  context: Any,
  nothing: Any,
  *,
  scale: float | Float[Array, ''] = 1.0,
  interval: tuple[float, float] = (0.0, 1.0),
  rescale: float = 0.0,
) -> denoisers.Denoiser:
  """Classifier-free guidance: ŷ = y(∅) + w (y(c) - y(∅)).

  Ho & Salimans 2022, eq. 6, with w for their 1 + w. y may be any prediction,
  since each is affine in x̂_0 at a given x_t. A learned variance is that for c.

  Args:
    denoiser: The model with all T steps; stride the result. Its network is
      called once per evaluation, on 2B rows.
    context: The condition c, B rows.
    nothing: The null condition ∅, of the same shapes.
    scale: w; 1 is the condition alone, 0 no condition.
    interval: Range of t / T where w applies; elsewhere w is 1  (Kynkäänniemi
      et al. 2024).
    rescale: In 0..1, how far to restore the standard deviation that the output
      has for c alone  (Lin et al. 2023, section 3.4).
  """
  network: Any = denoiser.network
  low, high = (x * denoiser.schedule.T for x in interval)

  def mixed(x_t: shapes.Batch, t: shapes.Times) -> Float[Array, 'B ...']:
    twice = (x_t, x_t), (t, t), (context, nothing)
    out = network(*(jax.tree.map(_rows, *pair) for pair in twice))
    given, without = jnp.split(out, 2)
    y, raw = denoisers.split(given, x_t)
    y_0, _ = denoisers.split(without, x_t)
    w = jnp.where((low <= t) & (t <= high), scale, 1.0)
    mix = y_0 + process.per_example(w, y) * (y - y_0)
    spread = _std(y) / jnp.maximum(_std(mix), 1e-6)
    mix *= 1 + rescale * (process.per_example(spread, y) - 1)
    return mix if raw is None else jnp.concatenate([mix, raw], axis=-1)

  return denoiser._replace(network=mixed)


def _rows(a: Array, b: Array) -> Array:
  return jnp.concatenate([a, b])


def _std(x: shapes.Batch) -> shapes.Values:
  return jnp.std(x.reshape(len(x), -1), axis=1)
