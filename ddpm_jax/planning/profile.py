"""Where the time of a compiled program goes, by kinds of operation."""

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

STEPS = 3  # that are traced
HOLDS_OTHERS = ('while', 'call', 'conditional')


class Cost(NamedTuple):
  """What operations of one kind take of a step."""

  kind: str  # such as `backward conv_general_dilated`
  seconds: float
  share: float  # of all operations
  number: int


def costliest(
  step: Callable[[], Any],
  folder: pathlib.Path,
  compiled: jax.stages.Compiled,
  most: int = 10,
) -> list[Cost]:
  """Traces a few steps into `folder`, and adds up their operations.

  Args:
    step: runs `compiled` once, and returns arrays.
    folder: what TensorBoard and Perfetto open comes below it.
    compiled: whose text says what operations are for.
    most: kinds that are returned, the costliest first.

  Of several processes the first one is traced.
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
  """(name of an instruction, seconds) of every event of a trace."""
  for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
    for line in plane.lines:
      for event in line.events:
        name = dict(event.stats).get('hlo_op')
        if name is None and line.name == 'XLA Ops':  # of a TPU
          name = event.name.removeprefix('%').partition(' ')[0]
        if name is not None:
          yield str(name), event.duration_ns / 1e9


def named(text: str) -> dict[str, str]:
  """What each instruction of a program in HLO text is for, by its name.

  A fusion without a note of its own is for what is costliest inside it.
  """
  inside = collections.defaultdict(list)
  everything = list(hlo.instructions(text))
  for i in everything:
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

  return {i.name: kind(i) for i in everything if i.opcode not in HOLDS_OTHERS}


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
  return '\n'.join(['of a train step, by kinds of operation', *rows])
