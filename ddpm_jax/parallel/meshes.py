"""The device mesh, and how arrays are laid out on it."""

import collections
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ddpm_jax import errors

AXES = ('data', 'fsdp', 'spatial')
BATCH = AXES[:2]  # The axes that shard the batch; 'spatial' shards image rows.


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  spatial: int = 1,
  *,
  local: bool = False,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """A mesh of data × fsdp × spatial devices.

  Args:
    data: Number of batch shards; -1 uses all remaining devices.
    fsdp: Number of state shards, which also shard the batch.
    spatial: Number of shards of each image, by rows.
    local: Whether to use the devices of this process alone, for work that
      processes do independently.
    devices: The devices; by default those of JAX.

  Raises:
    UserError: If there are too few devices, or an image would be split across
      processes.
  """
  several = devices is None and jax.process_count() > 1
  if devices is None:
    devices = jax.local_devices() if local else jax.devices()
  if local and several:
    data, fsdp, spatial = -1, 1, 1  # A recipe describes the global mesh.
  group = max(fsdp * spatial, 1)
  wanted = data * group if data > 0 else max(len(devices) // group, 1) * group
  nonsense = min(fsdp, spatial) < 1 or data == 0 or data < -1
  if nonsense or wanted > len(devices):
    raise errors.UserError(
      f'config.parallel.data={data} times config.parallel.fsdp={fsdp} times '
      f'config.parallel.spatial={spatial} does not fit the {len(devices)} '
      'device(s) here; --config.parallel.data=-1 --config.parallel.fsdp=1 '
      '--config.parallel.spatial=1 always does'
    )
  if not local and several and wanted != len(devices):
    raise errors.UserError(
      f'{wanted} of {len(devices)} devices: a run of several processes must '
      'use all; set parallel.data=-1'
    )
  shape = (wanted // group, fsdp, spatial)
  auto = (AxisType.Auto,) * 3  # linen does not support explicit axes
  if spatial == 1:
    return jax.make_mesh(shape, AXES, auto, devices=devices[:wanted])
  return Mesh(_by_process(devices, spatial)[:wanted].reshape(shape), AXES, auto)


def _by_process(devices: Sequence[Any], spatial: int) -> np.ndarray:
  """Devices in an order in which each group of `spatial` is in one process.

  A process loads whole images, so it must have all devices that share one.

  Raises:
    UserError: If `spatial` does not divide the number of devices of a process.
  """
  ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
  for here in collections.Counter(d.process_index for d in ordered).values():
    if here % spatial:
      raise errors.UserError(
        f'config.parallel.spatial={spatial} does not divide the {here} '
        'device(s) of a process'
      )
  return np.array(ordered)


def num_shards(mesh: Mesh) -> int:
  """Number of batch shards; each may be on several devices."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def num_processes(mesh: Mesh) -> int:
  """Number of processes that own the devices of a mesh."""
  return len({device.process_index for device in mesh.devices.flat})


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, P())


def over_batch(mesh: Mesh) -> NamedSharding:
  """The sharding of an array whose first axis is the batch."""
  return NamedSharding(mesh, P(BATCH))


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Gathers sharded arrays on every device, inside jit."""
  return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def shard_rows(images: jax.Array, mesh: Mesh) -> jax.Array:
  """Shards images (B, H, W, C) by rows over the 'spatial' axis, inside jit.

  The compiler adds the communication: convolutions exchange border rows, norms
  sum over devices, attention gathers keys and values.
  """
  if mesh.shape['spatial'] == 1:
    return images
  return jax.lax.with_sharding_constraint(
    images, NamedSharding(mesh, P(BATCH, 'spatial'))
  )


def state_sharding(mesh: Mesh, state: Any) -> Any:
  """FSDP: shards each array along its longest axis that `fsdp` divides."""
  n = mesh.shape['fsdp']

  def sharding(leaf: Any) -> NamedSharding:
    fits = [axis for axis, size in enumerate(leaf.shape) if size % n == 0]
    if n == 1 or not fits:
      return replicated(mesh)
    axis = max(fits, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, P(*[None] * axis, 'fsdp'))

  return jax.tree.map(sharding, state)


def abstract_state(init: Callable[[], Any], mesh: Mesh) -> Any:
  """The shapes, dtypes and shardings of the state that `init` returns."""
  state = jax.eval_shape(init)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    state_sharding(mesh, state),
  )


def init_state(init: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
  """Calls `init(*args)` under jit, with its result sharded from the start."""
  sharding = state_sharding(mesh, jax.eval_shape(init, *args))
  # It runs once: less optimization halves the time to compile it.
  quick = {'xla_backend_optimization_level': 0}
  compiled = jax.jit(init, out_shardings=sharding, compiler_options=quick)
  return compiled(*args)
