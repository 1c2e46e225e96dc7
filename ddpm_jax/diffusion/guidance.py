"""Classifier-free guidance: more of a condition than there is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Shaped

from ddpm_jax.diffusion import process


def guided(
  denoise: Callable[
    [Float[Array, 'n *shape'], Int[Array, 'n'], Any], Float[Array, 'n ...']
  ],
  given: Any,
  nothing: Any,
  *,
  T: int,
  scale: float | Float[Array, ''] = 1.0,
  interval: tuple[float, float] = (0.0, 1.0),
  rescale: float = 0.0,
) -> process.ModelFn:
  """A network told (1 - w) times nothing and w times a condition.

  ŷ = y(∅) + w (y(c) - y(∅)), in whatever the network predicts: for one x_t all
  predictions are affine in x̂_0 alike  (Ho & Salimans 2022, eq. 6, with w for
  their 1 + w). What it says of the variance is taken as given c.

  Args:
    denoise: (x_t, t, context) -> output; called once, on n = 2B rows.
    given: the context, B rows a leaf.
    nothing: that of no condition, the same shapes.
    T: steps of the process.
    scale: w; 1 is the condition alone, 0 none of it.
    interval: of t / T, where w counts; outside it is 1  (Kynkäänniemi et al.
      2024).
    rescale: 0..1, how far the output gets back the standard deviation that it
      has given c  (Lin et al. 2023, section 3.4).
  """

  def model_fn(
    x_t: Float[Array, 'B *shape'], t: Int[Array, 'B']
  ) -> Float[Array, 'B ...']:
    twice = (x_t, x_t), (t, t), (given, nothing)
    out = denoise(*(jax.tree.map(_rows, *pair) for pair in twice))
    with_c, without = jnp.split(out, 2)
    y, raw = process.split(with_c, x_t)
    y_0, _ = process.split(without, x_t)
    low, high = interval
    w = jnp.where((low * T <= t) & (t <= high * T), scale, 1.0)
    mixed = y_0 + _column(w, y) * (y - y_0)
    spread = _std(y) / jnp.maximum(_std(mixed), 1e-6)
    mixed *= 1 + rescale * (_column(spread, y) - 1)
    return mixed if raw is None else jnp.concatenate([mixed, raw], axis=-1)

  return model_fn


def _rows(
  a: Shaped[Array, 'B *shape'], b: Shaped[Array, 'B *shape']
) -> Shaped[Array, '2*B *shape']:
  return jnp.concatenate([a, b])


def _std(x: Float[Array, 'B *shape']) -> Float[Array, 'B']:
  return jnp.std(x.reshape(len(x), -1), axis=1)


def _column(
  w: Float[Array, 'B'], like: Float[Array, 'B *shape']
) -> Float[Array, 'B ...']:
  return w.reshape(-1, *(1,) * (like.ndim - 1))
