"""Profiles a compiled program: its time by kind of operation."""

import collections
import pathlib
import re
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from typing import NamedTuple

import jax

from ddpm_jax.parallel import processes
from ddpm_jax.planning import hlo

STEPS = 3  # traced
# Opcodes whose time includes that of other instructions.
CONTAINERS = ('while', 'call', 'conditional')


class Cost(NamedTuple):
  """The cost per step of the operations of one kind."""

  kind: str  # for example `backward conv_general_dilated`
  seconds: float
  share: float  # of the time of all operations, 0..1
  number: int  # of operations


def costliest(
  step: Callable[[], Any],
  folder: pathlib.Path,
  compiled: jax.stages.Compiled,
  most: int = 10,
) -> list[Cost]:
  """Traces a few steps; returns the costliest kinds of operation, sorted.

  Only the primary process is traced; the others return [].

  Args:
    step: Runs `compiled` once, and returns arrays.
    folder: Where the trace is written, for TensorBoard and Perfetto.
    compiled: The program; its HLO text gives the kinds of operations.
    most: Number of kinds to return.
  """
  jax.block_until_ready(step())
  trace_it = processes.is_primary()
  with jax.profiler.trace(str(folder)) if trace_it else nullcontext():
    for _ in range(STEPS):
      jax.block_until_ready(step())
  if not trace_it:
    return []
  trace = max(folder.rglob('*.xplane.pb'), key=lambda p: p.stat().st_mtime)
  kinds = named(compiled.as_text() or '')
  took: dict[str, float] = collections.defaultdict(float)
  number: dict[str, int] = collections.defaultdict(int)
  for name, seconds in operations(trace):
    if kind := kinds.get(name):
      took[kind] += seconds
      number[kind] += 1
  total = sum(took.values())
  return [
    Cost(kind, seconds / STEPS, seconds / total, round(number[kind] / STEPS))
    for kind, seconds in sorted(took.items(), key=lambda x: -x[1])[:most]
  ]


def operations(trace: pathlib.Path) -> Iterator[tuple[str, float]]:
  """Yields (instruction name, seconds) for every operation in a trace."""
  for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
    for line in plane.lines:
      for event in line.events:
        name = dict(event.stats).get('hlo_op')
        if name is None and line.name == 'XLA Ops':  # TPU
          name = event.name.removeprefix('%').partition(' ')[0]
        if name is not None:
          yield str(name), event.duration_ns / 1e9


def named(text: str) -> dict[str, str]:
  """Maps instruction names of a program in HLO text to kinds of operation.

  A fusion has the kind of the convolution or matrix product inside it, if any.
  """
  inside = collections.defaultdict(list)
  program = list(hlo.instructions(text))
  for i in program:
    inside[i.computation].append(i)

  def kind(i: hlo.Instruction) -> str:
    parts = [i]
    for how, name in hlo.CALLED.findall(i.rest):
      parts += inside[name] if how == 'calls' else []
    for wanted in ('convolution', 'dot', ''):
      these = [part for part in parts if wanted in part.opcode]
      found = [purpose(part.rest) for part in these]
      if wanted and these:
        return next(filter(None, found), wanted)
      if any(found):
        return next(filter(None, found))
    return re.sub(r'[.\d]+$', '', i.name)

  return {i.name: kind(i) for i in program if i.opcode not in CONTAINERS}


def purpose(rest: str) -> str:
  """`op_name="jit(f)/transpose(jvp(g))/dot"` -> backward dot."""
  found = re.search(r'op_name="([^"]*)"', rest)
  if not found:
    return ''
  *way, operation = found[1].split('/')
  if any('transpose(' in part for part in way):
    return f'backward {operation}'
  return f'forward {operation}' if 'jvp(' in found[1] else operation


def table(costs: list[Cost]) -> str:
  rows = [
    f'{c.share:6.1%}{1e3 * c.seconds:11.2f} ms{c.number:7} times  {c.kind}'
    for c in costs
  ]
  return '\n'.join(['time of a train step, by kind of operation', *rows])
