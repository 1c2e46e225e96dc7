"""Conditions: a denoiser whose network takes one, given it.

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
  """The denoiser given `context`, arrays with a row for each example."""
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
  """Classifier-free guidance: (1 - w) times no condition, w times a condition.

  ŷ = y(∅) + w (y(c) - y(∅)), for any prediction y: all are the same affine
  function of x̂_0 at one x_t  (Ho & Salimans 2022, eq. 6, with w for their
  1 + w). A learned variance is that given c.

  Args:
    denoiser: the model, of all T steps; stride it afterwards. Its network is
      called once, on 2B rows.
    context: the condition c, B rows.
    nothing: that of no condition ∅, of the same shapes.
    scale: w; 1 is the condition alone, 0 no condition.
    interval: of t / T, where w applies; outside of it w is 1  (Kynkäänniemi et
      al. 2024).
    rescale: in 0..1, how far the standard deviation of the output is set back
      to that given c  (Lin et al. 2023, section 3.4).
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
