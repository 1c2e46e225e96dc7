"""Devices: the mesh, how arrays lie on it, and the two compilers, jit and pmap.

A state is one ordinary array a leaf under both. With jit the compiler finds the
collectives from the shardings; with pmap they are written out, and its results
are on the devices of their own process; `to_global` makes them everyone's.
"""

import collections
import functools
import os
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
from ddpm_jax.storage import logs

AXES = ('data', 'fsdp', 'spatial')
BATCH = AXES[:2]  # those that share out a batch; the third cuts an image
ENGINES = ('jit', 'pmap')
COMPILER = {
  # This one puts together what is summed over devices, up to so many arrays
  # and bytes. Without limits all gradients (of a type) are summed at once;
  # clipping waits for the last of them anyway.
  'tpu': {
    'xla_jf_crs_combiner_threshold_count': 2**31 - 1,
    'xla_jf_crs_combiner_threshold_in_bytes': 2**31 - 1,
  },
  # Compiles the train step of configs/cifar.py in 0.6 of the time, and the step
  # is as fast. At level 0 it takes twice as long.
  'cpu': {'xla_backend_optimization_level': 1},
}


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  spatial: int = 1,
  *,
  local: bool = False,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """A mesh of data × fsdp × spatial devices; data = -1 takes all that are left.

  With `local` it is of this process's devices alone, for work that processes
  share out without talking to each other. `devices` are by default those here.

  Raises:
    UserError: if there are not so many devices, or they would cut an image
      across processes.
  """
  several = devices is None and jax.process_count() > 1
  if devices is None:
    devices = jax.local_devices() if local else jax.devices()
  if local and several:
    data, fsdp, spatial = -1, 1, 1  # what a recipe says is of all devices
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
  auto = (AxisType.Auto,) * 3  # linen knows no explicit axes
  if spatial == 1:
    return jax.make_mesh(shape, AXES, auto, devices=devices[:wanted])
  return Mesh(
    _in_one_process(devices, spatial)[:wanted].reshape(shape), AXES, auto
  )


def _in_one_process(devices: Sequence[Any], spatial: int) -> np.ndarray:
  """The devices, so that each `spatial` of them in a row are of one process.

  A process brings rows of the batch, whole images: it must have all devices
  that an image is cut over. They are also each other's neighbours.

  Raises:
    UserError: if there are not so many in a process.
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
  """The number of shards of a batch; each may be on several devices."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def over_batch(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P(BATCH))


def cut_rows(images: jax.Array, mesh: Mesh) -> jax.Array:
  """(B, H, W, C) with H over the devices of `spatial`, inside of jit.

  The compiler does the rest: convolutions send rows to their neighbours, norms
  add up, attention gathers keys and values.
  """
  if mesh.shape['spatial'] == 1:
    return images
  return jax.lax.with_sharding_constraint(
    images, NamedSharding(mesh, P(BATCH, 'spatial'))
  )


def _cut_batch(batch: Any, mesh: Mesh) -> Any:
  """`cut_rows` of the images of a batch, if it has any."""
  if not isinstance(batch, dict) or 'image' not in batch:
    return batch
  return batch | {'image': cut_rows(batch['image'], mesh)}


def state_sharding(mesh: Mesh, state: Any) -> Any:
  """FSDP: each leaf is cut along its longest axis that `fsdp` divides."""
  n = mesh.shape['fsdp']

  def sharding(leaf: Any) -> NamedSharding:
    fits = [axis for axis, size in enumerate(leaf.shape) if size % n == 0]
    if n == 1 or not fits:
      return replicated(mesh)
    axis = max(fits, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, P(*[None] * axis, 'fsdp'))

  return jax.tree.map(sharding, state)


def abstract_state(init: Callable[[], Any], mesh: Mesh) -> Any:
  """The shapes, types and shardings of the state that `init` returns."""
  state = jax.eval_shape(init)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    state_sharding(mesh, state),
  )


def init_state(init: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
  """The state that `init` makes of `args`, never whole on one device."""
  sharding = state_sharding(mesh, jax.eval_shape(init, *args))
  # It runs once: a compiler that optimises less takes half the time.
  quick = {'xla_backend_optimization_level': 0}
  compiled = jax.jit(init, out_shardings=sharding, compiler_options=quick)
  return compiled(*args)


def put(tree: Any, mesh: Mesh, how: str) -> Any:
  """This process's rows of a batch, NumPy -> what a compiled function takes."""
  if how == 'pmap':
    n, rows = len(mesh.local_devices), _pmap_sharding(mesh, P('batch'))
    return jax.tree.map(
      lambda x: jax.device_put(x.reshape(n, -1, *x.shape[1:]), rows), tree
    )
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(over_batch(mesh), x), tree
  )


def put_whole(tree: Any, mesh: Mesh, how: str) -> Any:
  """Like `put`, for a batch that every process has whole."""
  if how == 'pmap':
    devices = _by_process(mesh)
    first, n = devices.index(mesh.local_devices[0]), len(mesh.local_devices)

    def own(x: np.ndarray) -> np.ndarray:
      rows = len(x) // len(devices)
      return x[first * rows : (first + n) * rows]

    return put(jax.tree.map(own, tree), mesh, how)
  rows = over_batch(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(rows, x, x.shape), tree
  )


def _by_process(mesh: Mesh) -> list[Any]:
  """The devices in the order of pmap: those of a process stand together."""
  return sorted(mesh.devices.flat, key=lambda d: (d.process_index, d.id))


def _pmap_sharding(mesh: Mesh, spec: P) -> NamedSharding:
  """`spec` on the mesh that pmap builds of the devices of this process."""
  here = [
    d for d in _by_process(mesh) if d.process_index == jax.process_index()
  ]
  return NamedSharding(Mesh(np.array(here), ('batch',)), spec)


def to_global(tree: Any, mesh: Mesh) -> Any:
  """Arrays returned by pmap, as arrays on the devices of all processes.

  Under jit, and in a single process, the arrays are returned unchanged.
  """
  if jax.process_count() == 1:
    return tree
  whole = replicated(mesh)
  everywhere = whole.device_set

  def spread(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.sharding.device_set == everywhere:
      return x
    parts = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, whole, parts)

  return jax.tree.map(spread, tree)


def _relabel(tree: Any, sharding: NamedSharding) -> Any:
  """The arrays with an equivalent sharding: the same buffers, not a copy."""

  def relabel(x: jax.Array) -> jax.Array:
    if x.sharding == sharding:
      return x
    parts = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

  return jax.tree.map(relabel, tree)


def compiler_options(mesh: Mesh) -> dict[str, int]:
  """Of the mesh's platform, but for what XLA_FLAGS says itself."""
  options = COMPILER.get(mesh.devices.flat[0].platform, {})
  said = os.environ.get('XLA_FLAGS', '')
  return {name: value for name, value in options.items() if name not in said}


def compile_step(step: Callable, mesh: Mesh, how: str, state: Any) -> Callable:
  """A training step, such as `training.train_step`, compiled.

  Args:
    step: (state, batch, gather=, mean=, rows=) -> (state, metrics).
    mesh: of the devices to use.
    how: `jit` or `pmap`.
    state: the state, or its shapes.

  Returns:
    (state, batch) -> (state, metrics), for a batch that `put` has placed. The
    state given is donated: its memory becomes that of the state returned.
  """
  if how == 'pmap':
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
      devices=_by_process(mesh),
    )
    own = _pmap_sharding(mesh, P())

    # pmap returns the state on a mesh of its own. If the first state were on
    # ours, the second step would be compiled again.
    @functools.wraps(mapped)
    def on_own_mesh(state: Any, batch: Any) -> Any:
      return mapped(_relabel(state, own), batch)

    return on_own_mesh
  sharding = state_sharding(mesh, state)

  # Left to itself, XLA would split the convolutions along sharded kernels.
  # Gathering whole parameters and scattering gradients is what FSDP means.
  def mean(loss_and_grads: Any) -> Any:
    loss, grads = loss_and_grads
    return loss, jax.lax.with_sharding_constraint(grads, sharding.params)

  def on_mesh(state: Any, batch: Any) -> Any:
    batch = _cut_batch(batch, mesh)
    return step(state, batch, gather=lambda x: gather(x, mesh), mean=mean)

  return jax.jit(
    on_mesh,
    in_shardings=(sharding, over_batch(mesh)),
    out_shardings=(sharding, replicated(mesh)),
    donate_argnums=0,
    compiler_options=compiler_options(mesh),
  )


def gather(params: Any, mesh: Mesh) -> Any:
  return jax.lax.with_sharding_constraint(params, replicated(mesh))


def compile_map(
  fn: Callable, mesh: Mesh, how: str, params: Any, *, name: str = ''
) -> Callable:
  """A function (params, batch) -> arrays with one row an example, compiled.

  The function returned gives NumPy arrays of all rows. Its first call says
  that `name` is compiled, unless that is empty.
  """
  said = functools.partial(logs.compiling, name) if name else lambda f: f
  if how == 'pmap':
    mapped = said(_pmap_map(fn, mesh))
    # The results have a leading axis, of devices.
    return lambda params, batch: jax.tree.map(
      np.concatenate, jax.device_get(mapped(params, batch))
    )
  mapped = said(jit_map(fn, mesh, params))
  return lambda params, batch: jax.device_get(mapped(params, batch))


def _pmap_map(fn: Callable, mesh: Mesh) -> Callable:
  """pmap of a function; of several processes each gets all rows."""
  devices = _by_process(mesh)
  if len({d.process_index for d in devices}) == 1:
    return jax.pmap(fn, in_axes=(None, 0), devices=devices)
  mapped = jax.pmap(
    lambda params, batch: jax.lax.all_gather(fn(params, batch), 'batch'),
    axis_name='batch',
    in_axes=(None, 0),
    out_axes=None,
    devices=devices,
  )
  own = _pmap_sharding(mesh, P())
  return lambda params, batch: mapped(_relabel(params, own), batch)


def jit_map(fn: Callable, mesh: Mesh, params: Any) -> Any:
  """Like `compile_map` under jit, but the results stay on the devices.

  Of several processes each gets all rows.
  """
  rows = over_batch(mesh)
  several = len({device.process_index for device in mesh.devices.flat}) > 1
  return jax.jit(
    lambda params, batch: jax.lax.with_sharding_constraint(
      fn(gather(params, mesh), _cut_batch(batch, mesh)), rows
    ),
    in_shardings=(state_sharding(mesh, params), rows),
    out_shardings=replicated(mesh) if several else rows,
    compiler_options=compiler_options(mesh),
  )
