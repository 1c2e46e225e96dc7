"""How long things take, and how fast this machine is at best."""

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ddpm_jax.parallel import meshes


class Spread(NamedTuple):
  """Seconds of one call, over several."""

  median: float
  low: float
  high: float


def spread(took: list[float]) -> Spread:
  return Spread(statistics.median(took), min(took), max(took))


def clock(call: Callable[[], Any], *, seconds: float, least: int = 3) -> Spread:
  """Times `call` again and again, for about so many seconds.

  Each is timed until its arrays are there, after one that is not timed: it
  compiles, and gets its memory from the system. Of several processes all call
  it as often.
  """
  jax.block_until_ready(call())
  took: list[float] = []
  number = 1
  while len(took) < number:
    begun = time.perf_counter()
    jax.block_until_ready(call())
    took.append(time.perf_counter() - begun)
    if len(took) == 1:
      number = agreed(max(least, math.ceil(seconds / took[0])))
  return spread(took)


def agreed(number: int) -> int:
  """What process 0 says."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def compile_seconds(
  lowered: jax.stages.Lowered,
) -> tuple[float, jax.stages.Compiled]:
  begun = time.perf_counter()
  compiled = lowered.compile()
  return time.perf_counter() - begun, compiled


def peaks(
  mesh: jax.sharding.Mesh, dtype: str, seconds: float
) -> dict[str, float]:
  """FLOP/s of all devices of a mesh together, for the best of two sizes.

  `matmul`: of square matrices; `convolution`: 3x3, as in the U-Net. Each device
  has rows, or images, of its own.
  """
  cpu = mesh.devices.flat[0].platform == 'cpu'
  images = 8 if cpu else 256

  def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
      *(x, kernel, (1, 1), 'SAME'), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  def flops(work: Callable, x: tuple[int, ...], w: tuple[int, ...]) -> float:
    n, over_all = mesh.size, NamedSharding(mesh, P(mesh.axis_names))
    rows = jax.make_array_from_callback(
      (n * x[0], *x[1:]), over_all, lambda index: np.ones(x, dtype)
    )
    kernel = jax.device_put(np.ones(w, dtype), meshes.replicated(mesh))
    call = functools.partial(jax.jit(work), rows, kernel)
    # Each output is made of all of w that leads to it.
    number = 2 * n * math.prod(x[:-1]) * math.prod(w)
    return number / clock(call, seconds=seconds).low

  return {
    'matmul': max(
      flops(jnp.matmul, (m, m), (m, m))
      for m in ((512, 1024) if cpu else (4096, 8192))
    ),
    'convolution': max(
      flops(convolve, (images, side, side, c), (3, 3, c, c))
      for side, c in ((32, 128), (16, 256))
    ),
  }
