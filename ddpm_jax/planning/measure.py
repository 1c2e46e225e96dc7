"""Compiles a program, and reports its memory, work and time."""

import math
import re
import time
from typing import Any

import jax

from ddpm_jax.planning import hlo
from ddpm_jax.planning import programs
from ddpm_jax.planning import topology as targets

UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def program(p: programs.Program, target: targets.Target) -> dict[str, Any]:
  """Compiles a program; returns its numbers for one device.

  A number that is not known is None. If the compiler rejects the program
  because it does not fit, only the memory that it needs is known.
  """
  chip, turns = target.chip, p.turns
  state = device_bytes(p.args[0])
  found = {
    'fits': False if chip.memory else None,
    'images': p.images,
    'state_bytes': state,
    **dict.fromkeys(
      (
        *('argument_bytes', 'activation_bytes', 'code_bytes', 'peak_bytes'),
        *('flops', 'bytes', 'collectives', 'host_transfers', 'optimal_seconds'),
        *('roofline_seconds', 'bound_by', 'images_per_second', 'refused'),
      )
    ),
  }
  start = time.time()
  lowered = p.jitted.trace(*p.args).lower(lowering_platforms=(target.platform,))
  try:
    a = hlo.of(lowered.compile())
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    return found | {
      'peak_bytes': needed(str(e), state),
      'refused': str(e).splitlines()[0],
      'compile_seconds': time.time() - start,
    }
  found['compile_seconds'] = time.time() - start

  def all_turns(count: float | None) -> float | None:
    return count and count * turns

  flops, moved = all_turns(a.flops), all_turns(a.bytes)
  limits = {
    'arithmetic': flops and chip.flops and flops / chip.flops,
    'memory': moved and chip.bandwidth and moved / chip.bandwidth,
  }
  known = {k: v for k, v in limits.items() if v}
  bound_by = max(known, key=lambda k: known[k]) if known else None
  seconds = known[bound_by] if bound_by else None
  optimal = all_turns(a.optimal_seconds) or None
  return found | {
    # The TPU compiler rejects a program that does not fit; others do not check.
    'fits': target.platform == 'tpu' or (chip.memory and a.peak <= chip.memory),
    'argument_bytes': a.arguments,
    'activation_bytes': a.temporaries,
    'code_bytes': a.code,
    'peak_bytes': a.peak,
    'flops': flops,
    'bytes': moved,
    'collectives': {
      kind: {
        'count': c.number + c.in_loops * (turns - 1),
        'bytes': c.bytes + c.bytes_in_loops * (turns - 1),
      }
      for kind, c in a.collectives.items()
    },
    'host_transfers': len(a.host_transfers),
    'optimal_seconds': optimal,
    'roofline_seconds': seconds,
    'bound_by': bound_by,
    'images_per_second': seconds and p.images / seconds,
  }


def device_bytes(tree: Any) -> int:
  """Bytes of the arrays of a tree on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def needed(message: str, state: int) -> int | None:
  """Bytes needed according to an out-of-memory message; None if not stated.

  `state` is added where the message states only the temporaries.
  """
  for pattern, before in (
    (r'Used ([\d.]+)([KMGT]?) of', 0),
    (r'temporaries \(([\d.]+)([KMGT]?)\)', state),
  ):
    if found := re.search(pattern, message):
      return round(float(found[1]) * UNITS[found[2]]) + before
  return None
