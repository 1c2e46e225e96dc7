"""Conditions, which a network takes beside x_t and t: a class or a text.

`config.condition.name` names one of `__all__`, each an encoder: a linen module
that makes a `Context` of a condition. Its method `nothing` returns what stands
for no condition, which guidance needs (Ho & Salimans 2022).
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

MINILM_FEATURES = 384  # of its states

Given = Array | np.ndarray  # as data come


class Context(NamedTuple):
  """What a condition says, for the network."""

  pooled: Float[Array, 'B D']  # added to the time embedding
  states: Float[Array, 'B L D'] | None = None  # attended to by every pixel
  mask: Bool[Array, 'B L'] | None = None  # False where there is no state


def label(*, classes: int, width: int) -> 'Label':
  """The encoder of a class."""
  return Label(classes, width)


def text(*, length: int, width: int, depth: int) -> 'Text':
  """The encoder of a text, which is trained with the network."""
  return Text(length, width, depth)


def minilm(*, length: int, width: int) -> 'Frozen':
  """The encoder of a text, on top of a frozen MiniLM."""
  return Frozen(length, MINILM_FEATURES, width)


class Label(nn.Module):
  """A class in 0..classes-1, or -1 for nothing."""

  classes: int
  width: int

  def nothing(self, n: int) -> Int32[Array, '{n}']:
    return jnp.full(n, -1, jnp.int32)

  @nn.compact
  def __call__(self, label: Int[Given, 'B']) -> Context:
    row = jnp.where(label < 0, self.classes, label)
    return Context(nn.Embed(self.classes + 1, self.width)(row))


class Text(nn.Module):
  """A text as UTF-8 bytes, 0 after its end; '' is nothing.

  A transformer encoder of `depth` layers, normalised before each. Its first
  state is that of a token of its own, so that '' has one too.
  """

  length: int
  width: int
  depth: int
  heads: int = 4

  def nothing(self, n: int) -> UInt8[Array, '{n} {self.length}']:
    return jnp.zeros((n, self.length), jnp.uint8)

  @nn.compact
  def __call__(self, tokens: UInt8[Given, 'B {self.length}']) -> Context:
    # No text holds byte 0, which stands for the first token as well.
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
  """States (B, length, features) that another encoder made of a text.

  The condition is a dict of `states`, and `mask` (B, length), all False for
  nothing. A state of its own comes first, as in `Text`.
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
  """Of the states that there are."""
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
    """The output; without a condition it is that of `nothing`."""
    if condition is None:
      condition = self.encoder.nothing(len(x_t))
    return self.network(x_t, t, self.encoder(condition), **options)

  def encode(self, condition: Any) -> Context:
    return self.encoder(condition)

  def denoise(
    self, x_t: Float[Array, 'B *shape'], t: Int[Array, 'B'], context: Context
  ) -> Float32[Array, 'B ...']:
    return self.network(x_t, t, context)
