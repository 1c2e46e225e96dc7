"""Fingerprints of arrays, to detect changed bits in a checkpoint."""

import json
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def named(tree: Any) -> list[tuple[str, Any]]:
  return [
    (jax.tree_util.keystr(path, simple=True, separator='/'), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


def type_name(x: Any) -> str:
  return f'{x.dtype}{list(x.shape)}'


def describe(tree: Any) -> dict[str, list[Any]]:
  """Returns {name: [type, fingerprint]}, the same in every process."""
  # One at a time: many concurrent all-reduces can stall virtual devices.
  jax.block_until_ready(tree)
  return {
    name: [type_name(x), int(of_host(x) if is_on_host(x) else of_array(x))]
    for name, x in named(tree)
  }


def is_on_host(x: Any) -> bool:
  """Whether NumPy reads x without a copy: then nothing needs compiling."""
  return isinstance(x, np.ndarray) or (
    x.is_fully_addressable
    and [device.platform for device in x.devices()] == ['cpu']
  )


def of_host(x: Any) -> np.uint32:
  """`of_array` by NumPy."""
  x = np.ascontiguousarray(x).reshape(-1)
  word = {1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32)
  words = x.view(word).astype(np.uint32)
  odd = 2 * np.arange(words.size, dtype=np.uint32) + 1
  return np.sum(odd * words, dtype=np.uint32)


@jax.jit
def of_array(x: jax.Array) -> jax.Array:
  """Σ_i (2i + 1) w_i mod 2³² over the words w of `x`.

  The sum of integers is the same for any sharding, and with odd weights any
  single changed word changes it. Without a reshape nothing is gathered. It is
  compiled once per shape: compiling it for a whole tree would take long.
  """
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  index = jnp.uint32(0)
  for axis, n in enumerate(words.shape):
    iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    index = index * jnp.uint32(n) + iota
  return jnp.sum((2 * index + 1) * words, dtype=jnp.uint32)


def first_not_finite(tree: Any) -> str | None:
  """Returns the name of the first array that holds NaN or ∞, or None."""
  found = first_beyond(tree)
  return found[0] if found else None


def first_beyond(
  tree: Any, bound: float = math.inf
) -> tuple[str, float] | None:
  """Returns (name, max |x|) of the first array with max |x| ≥ bound or NaN."""
  for name, x in named(tree):
    if jnp.issubdtype(x.dtype, jnp.inexact):
      largest = float(_largest_of_host(x) if is_on_host(x) else _largest(x))
      if not largest < bound:
        return name, largest
  return None


@jax.jit
def _largest(x: jax.Array) -> jax.Array:
  return jnp.max(jnp.abs(x), initial=0)  # NaN, if there is one


def _largest_of_host(x: Any) -> Any:
  return np.max(np.abs(np.asarray(x)), initial=0)  # NaN, if there is one


def crc32(about: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(about, sort_keys=True).encode())
