"""Encoders of conditions: a class or a text that a network takes with x_t, t.

`config.condition.name` names one of `__all__`. Each returns a linen module that
encodes a condition as a `Context`. Its method `nothing` returns the null
condition, which guidance needs (Ho & Salimans 2022).
"""

from typing import Any
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Int
from jaxtyping import Int32
from jaxtyping import UInt8

__all__ = ['label', 'minilm', 'text']

MINILM_FEATURES = 384  # width of its states

Given = Array | np.ndarray  # a condition, as in the data


class Context(NamedTuple):
  """An encoded condition, for the network."""

  pooled: Float[Array, 'B D']  # added to the time embedding
  states: Float[Array, 'B L D'] | None = None  # attended to by every pixel
  mask: Bool[Array, 'B L'] | None = None  # False for padding


def label(*, classes: int, width: int) -> 'Label':
  """Returns the encoder of a class."""
  return Label(classes, width)


def text(*, length: int, width: int, depth: int) -> 'Text':
  """Returns the encoder of a text that is trained with the network."""
  return Text(length, width, depth)


def minilm(*, length: int, width: int) -> 'Frozen':
  """Returns the encoder of a text on top of a frozen MiniLM."""
  return Frozen(length, MINILM_FEATURES, width)


class Label(nn.Module):
  """Encodes a class in 0..classes-1, or -1 for no condition."""

  classes: int
  width: int

  def nothing(self, n: int) -> Int32[Array, '{n}']:
    return jnp.full(n, -1, jnp.int32)

  @nn.compact
  def __call__(self, label: Int[Given, 'B']) -> Context:
    row = jnp.where(label < 0, self.classes, label)
    return Context(nn.Embed(self.classes + 1, self.width)(row))


class Text(nn.Module):
  """Encodes a text, given as UTF-8 bytes padded with 0; '' is no condition.

  A pre-norm transformer encoder of `depth` layers. A start token comes before
  the text, so that '' has a state too.
  """

  length: int
  width: int
  depth: int
  heads: int = 4

  def nothing(self, n: int) -> UInt8[Array, '{n} {self.length}']:
    return jnp.zeros((n, self.length), jnp.uint8)

  @nn.compact
  def __call__(self, tokens: UInt8[Given, 'B {self.length}']) -> Context:
    # Byte 0 occurs in no text, so it is the start token too.
    row = jnp.pad(tokens, ((0, 0), (1, 0)))
    mask = (row > 0).at[:, 0].set(True)
    h = nn.Embed(256, self.width)(row)
    places = nn.Embed(self.length + 1, self.width)(jnp.arange(row.shape[1]))
    h += places[None]
    for _ in range(self.depth):
      heads = nn.MultiHeadDotProductAttention(self.heads)
      h += heads(nn.LayerNorm()(h), mask=mask[:, None, None])
      inner = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(h)))
      h += nn.Dense(self.width)(inner)
    h = nn.LayerNorm()(h)
    return Context(mean(h, mask), h, mask)


class Frozen(nn.Module):
  """Encodes a text, given as the states of a frozen encoder.

  A dict of `states` (B, length, features) and `mask` (B, length), which is all
  False for no condition. A learned state comes first, as in `Text`.
  """

  length: int
  features: int
  width: int

  def nothing(self, n: int) -> dict[str, Array]:
    return {
      'states': jnp.zeros((n, self.length, self.features), jnp.float16),
      'mask': jnp.zeros((n, self.length), bool),
    }

  @nn.compact
  def __call__(self, given: dict[str, Given]) -> Context:
    mask = jnp.pad(given['mask'], ((0, 0), (1, 0)), constant_values=True)
    states = nn.Dense(self.width)(given['states'].astype(jnp.float32))
    first = self.param('first', nn.initializers.normal(1.0), (self.width,))
    states = jnp.pad(states, ((0, 0), (1, 0), (0, 0)))
    h = nn.LayerNorm()(states.at[:, 0].set(first))
    return Context(mean(h, mask), h, mask)


def mean(
  states: Float[Array, 'B L D'], mask: Bool[Array, 'B L']
) -> Float[Array, 'B D']:
  """Mean over the states that are not masked."""
  return jnp.mean(states, axis=1, where=mask[:, :, None])


class Conditional(nn.Module):
  """A network and the encoder of its condition."""

  network: nn.Module
  encoder: nn.Module

  def __call__(
    self,
    x_t: Float[Array, 'B *shape'],
    t: Int[Array, 'B'],
    condition: Any = None,
    **options: Any,
  ) -> Float32[Array, 'B ...']:
    """Returns the network's output; None is the null condition."""
    if condition is None:
      condition = self.encoder.nothing(len(x_t))
    context = self.encoder(condition)
    out: Array = self.network(x_t, t, context, **options)
    return out

  def encode(self, condition: Any) -> Context:
    context: Context = self.encoder(condition)
    return context

  def denoise(
    self, x_t: Float[Array, 'B *shape'], t: Int[Array, 'B'], context: Context
  ) -> Float32[Array, 'B ...']:
    out: Array = self.network(x_t, t, context)
    return out
