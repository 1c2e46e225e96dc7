"""Devices to compile for, which this machine need not have, and their limits.

cpu:8      8 devices on the CPU of this machine
v5e:4x4    TPU: v4, v5e, v5p or v6e, and the shape of the slice in chips
h100:2x8   GPU: hosts x GPUs per host
"""

import math
import os
import re
from typing import Any
from typing import NamedTuple

import jax
from jax.experimental import topologies

from ddpm_jax import errors

GIB = 2**30


class Chip(NamedTuple):
  """Limits of one device; None is not known or not used."""

  memory: float | None = None  # bytes available to a program
  flops: float | None = None  # FLOP/s in bfloat16
  bandwidth: float | None = None  # bytes/s of the memory


# Memory is what libtpu 0.0.42 makes available to a program, of the 32, 16, 95
# and 32 GB of the chips. The other numbers are from
# docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e.
TPUS = {
  'v4': Chip(30.75 * GIB, 275e12, 1228e9),
  'v5e': Chip(15.75 * GIB, 197e12, 819e9),
  'v5p': Chip(95.74 * GIB, 459e12, 2765e9),
  'v6e': Chip(31.25 * GIB, 918e12, 1638e9),
}
# Description of an H100 SXM (80 GB) for the CUDA compiler.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
GPUS = {'h100': (Chip(memory=84942979072.0), H100)}
EXAMPLES = (
  *('cpu:8', 'v4:2x2x1', 'v5e:1x1', 'v5e:4x4', 'v5p:4x8x8', 'v6e:16x16'),
  'h100:1x8',
)


class Target(NamedTuple):
  name: str
  platform: str  # compiler platform: cpu, tpu or cuda
  devices: list[Any]
  chip: Chip


def find(name: str) -> Target:
  """Returns the devices of a topology such as `v5e:4x4`.

  Must be called before JAX is used: it restricts this process to the CPU.

  Raises:
    UserError: If the topology is unknown, or its compiler is not installed.
  """
  kind, _, shape = name.partition(':')
  sides = [int(side) for side in shape.split('x') if side.isdecimal()]
  unknown = errors.unknown('topology', name, EXAMPLES)
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape):
    raise unknown
  # Planning runs nothing, so it leaves the accelerators to other processes.
  # Programs for absent devices cannot be read back from a compilation cache.
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_enable_compilation_cache', False)
  if kind == 'cpu' and len(sides) == 1:
    return Target(name, 'cpu', _cpu(sides[0]), Chip())
  if kind in TPUS:
    return Target(name, 'tpu', _tpu(name, kind, sides), TPUS[kind])
  if kind in GPUS and len(sides) == 2:
    chip, described = GPUS[kind]
    return Target(name, 'cuda', _cuda(name, sides, described), chip)
  raise unknown


def _cpu(n: int) -> list[Any]:
  try:
    jax.config.update('jax_num_cpu_devices', n)
  except RuntimeError:  # JAX is already initialized.
    if len(jax.devices()) < n:
      raise errors.UserError(
        f'--topology=cpu:{n}: this process has {len(jax.devices())} devices'
      ) from None
  return jax.devices()[:n]


def _tpu(name: str, kind: str, sides: list[int]) -> list[Any]:
  errors.find_optional(
    'libtpu',
    what=f'--topology={name}',
    install="pip install -e '.[plan]'",
  )
  options: dict[str, Any] = {}
  if kind == 'v4':
    options['chip_config_name'] = 'megacore'  # one device per chip
  if math.prod(sides) == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  # Otherwise libtpu searches for a local TPU, and logs many lines about it.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-16')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  try:
    found = topologies.get_topology_desc(name, 'tpu', **options)
  except jax.errors.JaxRuntimeError as e:
    raise errors.UserError(
      f'--topology={name}: {e}; use for example {", ".join(EXAMPLES[1:-1])}'
    ) from None
  return list(found.devices)


def _cuda(name: str, sides: list[int], described: str) -> list[Any]:
  errors.find_optional(
    'jax_cuda13_plugin',
    what=f'--topology={name}',
    install="pip install -e '.[plan-cuda]'",
  )
  hosts, each = sides
  found = topologies.get_topology_desc(
    '', 'cuda', topology=f'1x{hosts}x{each}', target_config=described
  )
  return list(found.devices)
