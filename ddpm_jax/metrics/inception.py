"""Inception-v3 as FID uses it: TensorFlow's network of 2015-12-05.

It differs from torchvision's: it has 1008 classes, averages that exclude the
border, and a maximum in the last block, where the paper has an average. Names
are those of pytorch-fid, whose weights it loads, with batch norms folded in.

There are two ways to resize its input. `tensorflow` is the original, used by
Heusel et al. 2017 and other papers that evaluate with TensorFlow (DDPM among
them), ADM, StyleGAN, EDM and torch-fidelity. `pytorch_fid` is that package's,
which samples the source up to half a pixel away (4 of 299 pixels, for a side of
32). Features differ by 4% of their spread, for photographs of that size and
random weights. Both are published as FID; never compare one with the other.
"""

from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax

SIDE = 299  # pixels
CLASSES = 1008
# Published scores are computed in float32; TPUs and GPUs would round.
PRECISION = lax.Precision.HIGHEST


class Features(NamedTuple):
  pool: jax.Array  # (B, 2048), the last mean over the image: FID, KID
  spatial: jax.Array  # (B, 2023), 7 channels at 17 x 17 positions: sFID
  logits: jax.Array  # (B, 1008), without the bias, as for IS


# How images are resized: `config.evaluate.resize` names one.
__all__ = ['pytorch_fid', 'tensorflow']


def tensorflow(images: jax.Array) -> jax.Array:
  """uint8 (B, H, W, 3) -> float32 (B, 299, 299, 3), as TensorFlow 1 does it.

  Pixel i samples the source at i H/299, so the image shifts to the top left.
  """
  at = [np.arange(SIDE) * n / SIDE for n in images.shape[1:3]]
  return (_bilinear(images, *at) - 128) / 128


def pytorch_fid(images: jax.Array) -> jax.Array:
  """uint8 (B, H, W, 3) -> float32 (B, 299, 299, 3), as pytorch-fid does it.

  Pixel i samples it at (i + ½) H/299 - ½: centres match; no antialiasing.
  """
  at = [(np.arange(SIDE) + 0.5) * n / SIDE - 0.5 for n in images.shape[1:3]]
  return _bilinear(images, *at) / 127.5 - 1


def _bilinear(source: jax.Array, y: np.ndarray, x: np.ndarray) -> jax.Array:
  """Samples images (B, H, W, 3) at the grid y times x, clamped to the edge."""

  def weights(at: np.ndarray, n: int) -> np.ndarray:
    at = np.clip(at, 0, n - 1)
    distance = np.abs(at[:, None] - np.arange(n))
    return np.maximum(1 - distance, 0).astype(np.float32)

  H, W = source.shape[1:3]
  return jnp.einsum(
    'iy,byxc,jx->bijc',
    weights(y, H),
    source.astype(jnp.float32),
    weights(x, W),
    precision=PRECISION,
  )


def _conv(
  x: jax.Array,
  name: str,
  channels: int,
  size: tuple[int, int],
  stride: int = 1,
  padding: str = '',
) -> jax.Array:
  """Convolution and relu; stride 2 has no padding."""
  padding = padding or ('SAME' if stride == 1 else 'VALID')
  conv = nn.Conv(
    channels, size, stride, padding, precision=PRECISION, name=name
  )
  return nn.relu(conv(x))


def _shrink(x: jax.Array) -> jax.Array:
  return nn.max_pool(x, (3, 3), (2, 2))


def _mean(x: jax.Array) -> jax.Array:
  """3x3 average that excludes the padding."""
  return nn.avg_pool(x, (3, 3), (1, 1), 'SAME', count_include_pad=False)


def _max(x: jax.Array) -> jax.Array:
  return nn.max_pool(x, (3, 3), (1, 1), 'SAME')


class A(nn.Module):
  channels: int  # of the pooling branch

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    a = _conv(x, 'branch1x1', 64, (1, 1))
    b = _conv(x, 'branch5x5_1', 48, (1, 1))
    b = _conv(b, 'branch5x5_2', 64, (5, 5))
    c = _conv(x, 'branch3x3dbl_1', 64, (1, 1))
    c = _conv(c, 'branch3x3dbl_2', 96, (3, 3))
    c = _conv(c, 'branch3x3dbl_3', 96, (3, 3))
    d = _conv(_mean(x), 'branch_pool', self.channels, (1, 1))
    return jnp.concatenate([a, b, c, d], axis=-1)


class B(nn.Module):
  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    a = _conv(x, 'branch3x3', 384, (3, 3), 2)
    b = _conv(x, 'branch3x3dbl_1', 64, (1, 1))
    b = _conv(b, 'branch3x3dbl_2', 96, (3, 3))
    b = _conv(b, 'branch3x3dbl_3', 96, (3, 3), 2)
    return jnp.concatenate([a, b, _shrink(x)], axis=-1)


class C(nn.Module):
  channels: int  # of the inner layers of the 7 x 7 branches

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    n = self.channels
    a = _conv(x, 'branch1x1', 192, (1, 1))
    b = _conv(x, 'branch7x7_1', n, (1, 1))
    b = _conv(b, 'branch7x7_2', n, (1, 7))
    b = _conv(b, 'branch7x7_3', 192, (7, 1))
    c = _conv(x, 'branch7x7dbl_1', n, (1, 1))
    c = _conv(c, 'branch7x7dbl_2', n, (7, 1))
    c = _conv(c, 'branch7x7dbl_3', n, (1, 7))
    c = _conv(c, 'branch7x7dbl_4', n, (7, 1))
    c = _conv(c, 'branch7x7dbl_5', 192, (1, 7))
    d = _conv(_mean(x), 'branch_pool', 192, (1, 1))
    return jnp.concatenate([a, b, c, d], axis=-1)


class D(nn.Module):
  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    a = _conv(x, 'branch3x3_1', 192, (1, 1))
    a = _conv(a, 'branch3x3_2', 320, (3, 3), 2)
    b = _conv(x, 'branch7x7x3_1', 192, (1, 1))
    b = _conv(b, 'branch7x7x3_2', 192, (1, 7))
    b = _conv(b, 'branch7x7x3_3', 192, (7, 1))
    b = _conv(b, 'branch7x7x3_4', 192, (3, 3), 2)
    return jnp.concatenate([a, b, _shrink(x)], axis=-1)


class E(nn.Module):
  last: bool  # with a maximum, as in the 2015 network, perhaps by mistake

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    a = _conv(x, 'branch1x1', 320, (1, 1))
    b = _conv(x, 'branch3x3_1', 384, (1, 1))
    b_a = _conv(b, 'branch3x3_2a', 384, (1, 3))
    b_b = _conv(b, 'branch3x3_2b', 384, (3, 1))
    c = _conv(x, 'branch3x3dbl_1', 448, (1, 1))
    c = _conv(c, 'branch3x3dbl_2', 384, (3, 3))
    c_a = _conv(c, 'branch3x3dbl_3a', 384, (1, 3))
    c_b = _conv(c, 'branch3x3dbl_3b', 384, (3, 1))
    pooled = _max(x) if self.last else _mean(x)
    d = _conv(pooled, 'branch_pool', 192, (1, 1))
    return jnp.concatenate([a, b_a, b_b, c_a, c_b, d], axis=-1)


class Inception(nn.Module):
  @nn.compact
  def __call__(self, x: jax.Array) -> Features:
    """float32 (B, 299, 299, 3) in [-1, 1] -> features."""
    x = _conv(x, 'Conv2d_1a_3x3', 32, (3, 3), 2)
    x = _conv(x, 'Conv2d_2a_3x3', 32, (3, 3), padding='VALID')
    x = _conv(x, 'Conv2d_2b_3x3', 64, (3, 3))
    x = _shrink(x)
    x = _conv(x, 'Conv2d_3b_1x1', 80, (1, 1))
    x = _conv(x, 'Conv2d_4a_3x3', 192, (3, 3), padding='VALID')
    x = _shrink(x)
    x = A(32, name='Mixed_5b')(x)
    x = A(64, name='Mixed_5c')(x)
    x = A(64, name='Mixed_5d')(x)
    x = B(name='Mixed_6a')(x)
    x = C(128, name='Mixed_6b')(x)
    x = C(160, name='Mixed_6c')(x)
    x = C(160, name='Mixed_6d')(x)
    # Of TensorFlow's mixed_6/conv, as in Nash et al. 2021 and ADM.
    spatial = x[..., :7].reshape(len(x), -1)
    x = C(192, name='Mixed_6e')(x)
    x = D(name='Mixed_7a')(x)
    x = E(False, name='Mixed_7b')(x)
    x = E(True, name='Mixed_7c')(x)
    pool = x.mean(axis=(1, 2))
    fc = nn.Dense(CLASSES, use_bias=False, precision=PRECISION, name='fc')
    return Features(pool, spatial, fc(pool))


def parameters() -> Any:
  """The shapes of the network's parameters."""
  x = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
  return jax.eval_shape(Inception().init, jax.random.key(0), x)['params']


def from_torch(state: Mapping[str, np.ndarray]) -> Any:
  """Converts a state dict of pytorch-fid, and folds batch norms in.

  Raises:
    ValueError: If an array is missing, unknown, or has a wrong shape.
  """
  rest = dict(state)

  def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in rest:
      raise ValueError(f'it has no {name}')
    x = np.asarray(rest.pop(name), np.float64)
    if x.shape != shape:
      raise ValueError(f'its {name} is {x.shape}, not {shape}')
    return x

  params = {}
  for path, leaf in traverse_util.flatten_dict(parameters()).items():
    name, n = '.'.join(path[:-1]), leaf.shape[-1]
    if name == 'fc':
      params[path] = take('fc.weight', leaf.shape[::-1]).T
    elif path[-1] == 'kernel':
      h, w, m, n = leaf.shape
      kernel = take(f'{name}.conv.weight', (n, m, h, w)).transpose(2, 3, 1, 0)
      scale, bias, mean, variance = (
        take(f'{name}.bn.{part}', (n,))
        for part in ('weight', 'bias', 'running_mean', 'running_var')
      )
      scale /= np.sqrt(variance + 1e-3)
      params[path] = kernel * scale
      params[*path[:-1], 'bias'] = bias - mean * scale
  unused = [
    name
    for name in rest
    if name != 'fc.bias' and not name.endswith('.num_batches_tracked')
  ]
  if unused:
    raise ValueError(f'it has an unknown {unused[0]}')
  params = {path: x.astype(np.float32) for path, x in params.items()}
  return traverse_util.unflatten_dict(params)
