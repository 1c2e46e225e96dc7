"""Converts U-Net weights from and to Hugging Face diffusers, and
pesser/pytorch_diffusion, a PyTorch port of the authors' code.

Both store convolutions as (out, in, height, width) and dense layers as (out,
in); here they are (height, width, in, out) and (in, out). Only layouts and
names differ; the skips are concatenated in the same order.
"""

import re
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from ddpm_jax import errors


class Names(NamedTuple):
  """Another program's names for the parts of our U-Net.

  In patterns, `level` counts from the full resolution, `rise` from the lowest,
  and `i` counts the blocks of a level in the order of computation.
  """

  parts: Mapping[str, str]
  block: Mapping[str, str]
  attention: Mapping[str, str]
  down: str
  down_attention: str
  downsample: str
  up: str
  up_attention: str
  upsample: str


DIFFUSERS = Names(
  parts={
    'classes': 'class_embedding',
    'time_1': 'time_embedding.linear_1',
    'time_2': 'time_embedding.linear_2',
    'conv_in': 'conv_in',
    'middle_0': 'mid_block.resnets.0',
    'middle_0_attention': 'mid_block.attentions.0',
    'middle_1': 'mid_block.resnets.1',
    'norm': 'conv_norm_out',
    'conv_out': 'conv_out',
  },
  block={
    'norm_1': 'norm1',
    'conv_1': 'conv1',
    'time': 'time_emb_proj',
    'norm_2': 'norm2',
    'conv_2': 'conv2',
    'shortcut': 'conv_shortcut',
  },
  attention={
    'norm': 'group_norm',
    'q': 'to_q',
    'k': 'to_k',
    'v': 'to_v',
    'out': 'to_out.0',
  },
  down='down_blocks.{level}.resnets.{i}',
  down_attention='down_blocks.{level}.attentions.{i}',
  downsample='down_blocks.{level}.downsamplers.0.conv',
  up='up_blocks.{rise}.resnets.{i}',
  up_attention='up_blocks.{rise}.attentions.{i}',
  upsample='up_blocks.{rise}.upsamplers.0.conv',
)
PYTORCH_DIFFUSION = Names(
  parts={
    'time_1': 'temb.dense.0',
    'time_2': 'temb.dense.1',
    'conv_in': 'conv_in',
    'middle_0': 'mid.block_1',
    'middle_0_attention': 'mid.attn_1',
    'middle_1': 'mid.block_2',
    'norm': 'norm_out',
    'conv_out': 'conv_out',
  },
  block={
    'norm_1': 'norm1',
    'conv_1': 'conv1',
    'time': 'temb_proj',
    'norm_2': 'norm2',
    'conv_2': 'conv2',
    'shortcut': 'nin_shortcut',
  },
  attention={'norm': 'norm', 'q': 'q', 'k': 'k', 'v': 'v', 'out': 'proj_out'},
  down='down.{level}.block.{i}',
  down_attention='down.{level}.attn.{i}',
  downsample='down.{level}.downsample.conv',
  up='up.{level}.block.{i}',
  up_attention='up.{level}.attn.{i}',
  upsample='up.{level}.upsample.conv',
)
# Added to the time embedding; one row per class.
CLASSES = 'class_embedding.weight'
# Names of the parts of attention before diffusers 0.15, and in weights released
# before it.
OLD_ATTENTION = {
  'query': 'to_q',
  'key': 'to_k',
  'value': 'to_v',
  'proj_attn': 'to_out.0',
}


def name(path: tuple[str, ...], levels: int, names: Names) -> str:
  """Their name of a parameter such as ('up_0_2', 'conv_1', 'kernel')."""
  *(module, *inner), leaf = path
  leaf = 'bias' if leaf == 'bias' else 'weight'
  if module in names.parts:
    outer = names.parts[module]
  else:
    found = re.fullmatch(r'([a-z]+)_(\d+)(?:_(\d+))?(_attention)?', module)
    assert found, module
    way, level, i, attention = found.groups()
    pattern = getattr(names, way + (attention or ''))
    outer = pattern.format(level=level, rise=levels - 1 - int(level), i=i)
  table = names.attention if module.endswith('_attention') else names.block
  return '.'.join([outer, *(table[part] for part in inner), leaf])


def to_params(
  abstract: Any, tensors: Mapping[str, np.ndarray], names: Names
) -> Any:
  """Converts the tensors of another program into our parameters, float32.

  If the class embedding lacks the row for no class, a row of zeros is added.

  Args:
    abstract: The tree of parameters; its leaves have a shape.
    tensors: The tensors by name, of any float type.
    names: The other program's names.

  Raises:
    UserError: If a tensor is missing, unknown, not finite, or has a wrong
      shape; the message names it.
  """
  tensors = {modern(name): x for name, x in tensors.items()}
  if 'encoder' in abstract:
    return _to_conditional(abstract, tensors, names)
  wanted = traverse_util.flatten_dict(abstract)
  levels = count_levels(wanted)
  theirs = {path: name(path, levels, names) for path in wanted}
  for what, some in (
    ('lack', set(theirs.values()) - set(tensors)),
    (
      'hold tensors with no place in the network',
      set(tensors) - {*theirs.values()},
    ),
  ):
    if some:
      raise errors.UserError(
        f'the weights {what}: {_listed(some)} ({len(some)} in all); they '
        'belong to another network than that of the configuration'
      )
  return traverse_util.unflatten_dict(
    {
      path: _checked(
        theirs[path], _from_torch(tensors[theirs[path]], path), x.shape
      )
      for path, x in wanted.items()
    }
  )


def _listed(names: set[str]) -> str:
  return ', '.join(errors.short(name) for name in sorted(names)[:3])


def from_params(params: Any, names: Names) -> dict[str, np.ndarray]:
  """Converts our parameters into another program's tensors, by name."""
  if 'encoder' in params:
    params = _from_conditional(params)
  flat = traverse_util.flatten_dict(params)
  levels = count_levels(flat)
  return {
    name(path, levels, names): np.ascontiguousarray(
      _to_torch(np.asarray(x), path)
    )
    for path, x in flat.items()
  }


def _from_conditional(params: Any) -> Any:
  """Merges the class encoder into the U-Net's parameters, as `classes`.

  Our embedding and the dense layer after it are linear, so one embedding as
  wide as the time embedding is equivalent.
  """
  network = {**params['network']}
  dense = network.pop('condition')
  embedding = np.asarray(params['encoder']['Embed_0']['embedding'], np.float64)
  rows = embedding @ np.asarray(dense['kernel']) + np.asarray(dense['bias'])
  return {**network, 'classes': {'embedding': rows.astype(np.float32)}}


def _to_conditional(
  abstract: Any, tensors: Mapping[str, np.ndarray], names: Names
) -> Any:
  """Inverse of `_from_conditional`, with the identity as the dense layer."""
  network, embedding = {**abstract['network']}, abstract['encoder']['Embed_0']
  del network['condition']
  classes = tensors.get(CLASSES, np.zeros(0))
  rows, width = embedding['embedding'].shape
  if classes.shape[:1] == (rows - 1,):
    none = np.zeros_like(classes[:1])
    tensors = {**tensors, CLASSES: np.concatenate([classes, none])}
  found = to_params({**network, 'classes': embedding}, tensors, names)
  identity = np.eye(width, dtype=np.float32)
  dense = {'kernel': identity, 'bias': np.zeros(width, np.float32)}
  return {
    'encoder': {'Embed_0': found.pop('classes')},
    'network': {**found, 'condition': dense},
  }


def count_levels(paths: Any) -> int:
  return 1 + max(
    int(module.split('_')[1])
    for module, *_ in paths
    if re.match(r'down_\d', module)
  )


def modern(name: str) -> str:
  """The name since diffusers 0.15 of a tensor with an older name."""
  return re.sub(
    r'(\.attentions\.\d+\.)(query|key|value|proj_attn)\.',
    lambda found: f'{found[1]}{OLD_ATTENTION[found[2]]}.',
    name,
  )


def _from_torch(x: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
  if path[-1] != 'kernel':
    return x
  if x.ndim == 4 and x.shape[2:] == (1, 1):  # a dense layer here
    x = x[..., 0, 0]
  return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def _to_torch(x: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
  if path[-1] != 'kernel':
    return x
  x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
  return x[..., None, None] if path[-2] == 'shortcut' else x


def _checked(name: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  if x.shape != shape:
    raise errors.UserError(
      f'{name} is {x.shape} in our layout, and the configuration needs '
      f'{shape}: the weights belong to another network'
    )
  if not np.all(np.isfinite(x)):
    raise errors.UserError(f'{name} has values that are not finite')
  return np.ascontiguousarray(x, np.float32)
