"""Compiles functions for a device mesh: `Jit` or `Pmap`, chosen once.

Under both, a state is one array a leaf. With jit, the compiler derives the
collectives from the shardings. With pmap they are written out, and results are
on the devices of their own process; `to_global` makes them global arrays.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ddpm_jax.parallel import meshes
from ddpm_jax.storage import logs

COMPILER = {
  # The combiner sums gradients over devices together, up to a number of arrays
  # and bytes. Without limits, all gradients of a dtype are summed at once;
  # clipping waits for the last of them anyway.
  'tpu': {
    'xla_jf_crs_combiner_threshold_count': 2**31 - 1,
    'xla_jf_crs_combiner_threshold_in_bytes': 2**31 - 1,
  },
  # Compiles the train step of configs/cifar.py in 0.6 of the time, and the step
  # is as fast. Level 0 makes it half as fast.
  'cpu': {'xla_backend_optimization_level': 1},
}

# (state, batch) -> (state, metrics)
TrainStep = Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
# (params, batch) -> arrays with a row for each example
Map = Callable[[Any, Any], Any]


class Engine(Protocol):
  """Places arrays on the devices of a mesh and compiles functions for them."""

  @property
  def mesh(self) -> Mesh:
    """The devices."""

  def put(self, batch: Any) -> Any:
    """Places this process's rows of a batch (NumPy arrays) on its devices."""

  def put_whole(self, batch: Any) -> Any:
    """Like `put`, for a batch of which every process has all rows."""

  def compile_step(self, step: Callable[..., Any], state: Any) -> TrainStep:
    """Compiles a training step, such as `training.train_step`.

    Args:
      step: (state, batch, gather=, mean=, rows=) -> (state, metrics).
      state: The state, or its shapes.

    Returns:
      (state, batch) -> (state, metrics), for a batch that `put` has placed. It
      donates the state: its memory is reused for the new one.
    """

  def compile_map(self, fn: Map, params: Any, *, name: str = '') -> Map:
    """Compiles a function that maps a batch row by row.

    Args:
      fn: (params, batch) -> arrays with a row for each example.
      params: The weights, or their shapes.
      name: Name of `fn` in the message that it is being compiled; '' for none.

    Returns:
      (params, batch) -> NumPy arrays of all rows, in every process.
    """

  def to_global(self, tree: Any) -> Any:
    """Makes the arrays that a step returned global arrays of all processes."""


@dataclasses.dataclass(frozen=True)
class Jit:
  """`Engine` by jit: data, FSDP and spatial sharding."""

  mesh: Mesh

  def put(self, batch: Any) -> Any:
    rows = meshes.over_batch(self.mesh)
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(rows, x), batch
    )

  def put_whole(self, batch: Any) -> Any:
    rows = meshes.over_batch(self.mesh)
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(rows, x, x.shape), batch
    )

  def compile_step(self, step: Callable[..., Any], state: Any) -> TrainStep:
    mesh = self.mesh
    sharding = meshes.state_sharding(mesh, state)

    # Left to itself, XLA would split the convolutions along sharded kernels.
    # FSDP means to gather whole parameters and to scatter gradients.
    def mean(loss_and_grads: Any) -> Any:
      loss, grads = loss_and_grads
      return loss, jax.lax.with_sharding_constraint(grads, sharding.params)

    def on_mesh(state: Any, batch: Any) -> Any:
      return step(
        *(state, self._shard_images(batch)),
        gather=lambda x: meshes.replicate(x, mesh),
        mean=mean,
      )

    return jax.jit(
      on_mesh,
      in_shardings=(sharding, meshes.over_batch(mesh)),
      out_shardings=(sharding, meshes.replicated(mesh)),
      donate_argnums=0,
      compiler_options=compiler_options(mesh),
    )

  def compile_map(self, fn: Map, params: Any, *, name: str = '') -> Map:
    mapped = _announced(self.jit_map(fn, params), name)
    return lambda params, batch: jax.device_get(mapped(params, batch))

  def jit_map(self, fn: Map, params: Any) -> Any:
    """Like `compile_map`, but the jitted function: results stay on devices."""
    mesh = self.mesh
    rows = meshes.over_batch(mesh)
    several = meshes.num_processes(mesh) > 1
    return jax.jit(
      lambda params, batch: jax.lax.with_sharding_constraint(
        fn(meshes.replicate(params, mesh), self._shard_images(batch)), rows
      ),
      in_shardings=(meshes.state_sharding(mesh, params), rows),
      out_shardings=meshes.replicated(mesh) if several else rows,
      compiler_options=compiler_options(mesh),
    )

  def _shard_images(self, batch: Any) -> Any:
    if not isinstance(batch, dict) or 'image' not in batch:
      return batch
    return batch | {'image': meshes.shard_rows(batch['image'], self.mesh)}

  def to_global(self, tree: Any) -> Any:
    return tree


@dataclasses.dataclass(frozen=True)
class Pmap:
  """`Engine` by pmap: data parallelism alone."""

  mesh: Mesh

  def put(self, batch: Any) -> Any:
    n, rows = len(self.mesh.local_devices), self._local_sharding(P('batch'))
    return jax.tree.map(
      lambda x: jax.device_put(x.reshape(n, -1, *x.shape[1:]), rows), batch
    )

  def put_whole(self, batch: Any) -> Any:
    devices, local = self._devices(), self.mesh.local_devices
    first = devices.index(local[0])

    def own(x: np.ndarray) -> np.ndarray:
      rows = len(x) // len(devices)
      return x[first * rows : (first + len(local)) * rows]

    return self.put(jax.tree.map(own, batch))

  def compile_step(self, step: Callable[..., Any], state: Any) -> TrainStep:
    del state  # pmap replicates it
    mapped = jax.pmap(
      functools.partial(
        step,
        mean=lambda x: jax.lax.pmean(x, 'batch'),
        rows=lambda x: jax.lax.all_gather(x, 'batch', tiled=True),
      ),
      axis_name='batch',
      in_axes=(None, 0),
      out_axes=(None, None),
      donate_argnums=0,
      devices=self._devices(),
    )
    return self._on_local_mesh(mapped)

  def compile_map(self, fn: Map, params: Any, *, name: str = '') -> Map:
    del params  # pmap replicates them
    mapped = _announced(self._map(fn), name)
    # The results have a leading axis of devices.
    return lambda params, batch: jax.tree.map(
      np.concatenate, jax.device_get(mapped(params, batch))
    )

  def _map(self, fn: Map) -> Any:
    devices = self._devices()
    if meshes.num_processes(self.mesh) == 1:
      return jax.pmap(fn, in_axes=(None, 0), devices=devices)
    mapped = jax.pmap(
      lambda params, batch: jax.lax.all_gather(fn(params, batch), 'batch'),
      axis_name='batch',
      in_axes=(None, 0),
      out_axes=None,
      devices=devices,
    )
    return self._on_local_mesh(mapped)

  def to_global(self, tree: Any) -> Any:
    if jax.process_count() == 1:
      return tree
    everywhere = meshes.replicated(self.mesh)

    def spread(x: Any) -> Any:
      local = isinstance(x, jax.Array) and (
        x.sharding.device_set != everywhere.device_set
      )
      return _with_sharding(x, everywhere) if local else x

    return jax.tree.map(spread, tree)

  def _devices(self) -> list[Any]:
    """The devices in pmap's order: those of a process are adjacent."""
    return sorted(self.mesh.devices.flat, key=lambda d: (d.process_index, d.id))

  def _local_sharding(self, spec: P) -> NamedSharding:
    """`spec` on the mesh that pmap makes of the devices of this process."""
    own = [d for d in self._devices() if d.process_index == jax.process_index()]
    return NamedSharding(Mesh(np.array(own), ('batch',)), spec)

  def _on_local_mesh(self, mapped: Callable[..., Any]) -> Callable[..., Any]:
    """Gives `mapped` its first argument on the mesh on which pmap returns it.

    Otherwise the second step would be compiled again.
    """
    own = self._local_sharding(P())

    @functools.wraps(mapped)
    def call(state: Any, batch: Any) -> Any:
      state = jax.tree.map(
        lambda x: x if x.sharding == own else _with_sharding(x, own), state
      )
      return mapped(state, batch)

    return call


ENGINES: dict[str, Callable[[Mesh], Engine]] = {'jit': Jit, 'pmap': Pmap}


def _with_sharding(x: jax.Array, sharding: NamedSharding) -> jax.Array:
  """The same buffers under another sharding, without a copy."""
  parts = [shard.data for shard in x.addressable_shards]
  return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)


def _announced(fn: Map, name: str) -> Map:
  """`fn`, whose first call says that `name` is being compiled."""
  return logs.compiling(name, fn) if name else fn


def compiler_options(mesh: Mesh) -> dict[str, int]:
  """Compiler options for the mesh's platform, unless XLA_FLAGS sets them."""
  options = COMPILER.get(mesh.devices.flat[0].platform, {})
  said = os.environ.get('XLA_FLAGS', '')
  return {name: value for name, value in options.items() if name not in said}
