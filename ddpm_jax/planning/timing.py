"""Measures the time of calls, and the peak FLOP/s of this machine."""

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
  """Seconds per call: median, minimum and maximum over several calls."""

  median: float
  low: float
  high: float


def spread(took: list[float]) -> Spread:
  return Spread(statistics.median(took), min(took), max(took))


def clock(call: Callable[[], Any], *, seconds: float, least: int = 3) -> Spread:
  """Times calls for about `seconds` in total, at least `least` of them.

  Each is timed until its arrays are ready. A first call, which compiles and
  allocates memory, is not timed. All processes make as many calls.
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
  """The number of process 0, for all processes."""
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
  """Measures the FLOP/s of all devices of a mesh together.

  `matmul` is for square matrices, `convolution` for 3x3 kernels as in the
  U-Net; each is the best of two sizes. Each device has its own rows or images.
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
    # 2 prod(w) FLOPs for each row or pixel.
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
