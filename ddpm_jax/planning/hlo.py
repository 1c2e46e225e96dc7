"""What a compiled program says of itself: memory, work, collectives.

All numbers are of one device. Nothing is run: the program may be for devices
that are not here.
"""

import re
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'collective-permute',
  'all-to-all',
  'ragged-all-to-all',
  'collective-broadcast',
)
HOST = ('infeed', 'outfeed', 'send', 'recv')

# `ROOT %name = type opcode(operands), attributes`: the opcode is the first word
# before a parenthesis, for those inside a type follow a colon or another one.
INSTRUCTION = re.compile(
  r'^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$'
)
COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.-]+) \(.*\{$')
CALLED = re.compile(
  r'\b(calls|to_apply|body|condition|\w+_computation)=%?([\w.-]+)'
)
CALLED_LIST = re.compile(r'\b\w+_computations=\{([^}]*)\}')
ARRAY = re.compile(r'\b(pred|[a-z]+(\d+)\w*)\[([\d,<=]*)\]')


class Collective(NamedTuple):
  """The collectives of one kind in a program, as its text has them.

  The bytes are of the larger of what goes in and what comes out: of the whole
  array that is reduced, gathered or moved. One in the body of a loop stands
  once in the text, and runs in every turn.
  """

  number: int
  bytes: int
  in_loops: int  # of `number`
  bytes_in_loops: int  # of `bytes`


class Account(NamedTuple):
  """Bytes of memory, and work, of one device. A count is None if unknown.

  `flops` and `bytes` are the compiler's own, and have the body of a loop once,
  however often it runs.
  """

  arguments: int
  outputs: int  # with what is donated
  donated: int  # of the outputs, what takes the memory of arguments
  temporaries: int
  code: int
  peak: int  # all of it at once
  flops: float | None
  bytes: float | None  # read and written
  optimal_seconds: float | None  # of the compiler's model of the device
  collectives: dict[str, Collective]  # those that there are, by kind
  host_transfers: tuple[str, ...]  # names of instructions that talk to the host


def of(compiled: Any) -> Account:
  """The account of what `jax.jit(f).lower(...).compile()` returns."""
  memory, text = compiled.memory_analysis(), compiled.as_text()
  cost = compiled.cost_analysis() or {}
  # Some versions give a list of one.
  cost = cost[0] if isinstance(cost, list) else cost

  def known(key: str) -> float | None:
    value = cost.get(key, -1.0)
    return value if value >= 0 else None  # below zero means: not known

  arguments = memory.argument_size_in_bytes
  outputs = memory.output_size_in_bytes
  donated = memory.alias_size_in_bytes
  temporaries = memory.temp_size_in_bytes
  code = memory.generated_code_size_in_bytes
  return Account(
    arguments=arguments,
    outputs=outputs,
    donated=donated,
    temporaries=temporaries,
    code=code,
    peak=arguments + outputs - donated + temporaries + code,
    flops=known('flops'),
    bytes=known('bytes accessed'),
    optimal_seconds=known('optimal_seconds'),
    collectives=collectives(text),
    host_transfers=host_transfers(text),
  )


class Instruction(NamedTuple):
  computation: str
  name: str
  type: str
  opcode: str
  rest: str  # operands and attributes


def instructions(text: str) -> Iterator[Instruction]:
  """Those of a program in XLA's HLO text, such as `compiled.as_text()`."""
  computation = ''
  for line in text.splitlines():
    if head := COMPUTATION.match(line):
      computation = head[1]
    elif found := INSTRUCTION.match(line):
      yield Instruction(computation, *found.groups())


def collectives(text: str) -> dict[str, Collective]:
  """Those of a program, by kind; an asynchronous pair counts as one."""
  all_of_them = list(instructions(text))
  sizes = {i.name: type_bytes(i.type) for i in all_of_them}
  looped = in_loops(all_of_them)
  found: dict[str, Collective] = {}
  for i in all_of_them:
    kind = i.opcode.removesuffix('-start')
    if kind not in KINDS:
      continue
    size = collective_bytes(i, sizes)
    inside = i.computation in looped
    before = found.get(kind, Collective(0, 0, 0, 0))
    found[kind] = Collective(
      before.number + 1,
      before.bytes + size,
      before.in_loops + inside,
      before.bytes_in_loops + size * inside,
    )
  return found


def collective_bytes(i: Instruction, sizes: dict[str, int]) -> int:
  into = sum(sizes.get(name, 0) for name in operands(i.rest))
  out = sizes[i.name]
  if i.opcode == 'collective-permute-start':
    return into or out // 2
  if i.opcode.endswith('-start') and out > into:
    out -= into  # its type holds the operands as well
  return max(into, out)


def operands(rest: str) -> list[str]:
  """The names in `%a, f32[2]{0} %b), attributes`."""
  depth = 0
  for end, character in enumerate(rest):
    depth += (character == '(') - (character == ')')
    if depth < 0:
      return re.findall(r'%([\w.-]+)', rest[:end])
  return re.findall(r'%([\w.-]+)', rest)


def type_bytes(text: str) -> int:
  """Of an array or a tuple, such as `(f32[8,32]{1,0}, u32[])`."""
  total = 0
  for name, bits, shape in ARRAY.findall(text):
    size = 8 if name == 'pred' else int(bits)
    for side in shape.replace('<=', '').split(','):
      size *= int(side or 1)
    total += -(-size // 8)
  return total


def in_loops(all_of_them: list[Instruction]) -> set[str]:
  """The computations that run in every turn of some loop."""
  calls: dict[str, set[str]] = {}
  waiting = []
  for i in all_of_them:
    for how, name in CALLED.findall(i.rest):
      calls.setdefault(i.computation, set()).add(name)
      if i.opcode == 'while' and how in ('body', 'condition'):
        waiting.append(name)
    for names in CALLED_LIST.findall(i.rest):
      calls.setdefault(i.computation, set()).update(
        re.findall(r'[\w.-]+', names)
      )
  found: set[str] = set()
  while waiting:
    name = waiting.pop()
    if name not in found:
      found.add(name)
      waiting += calls.get(name, ())
  return found


def host_transfers(text: str) -> tuple[str, ...]:
  """The instructions that stop for the host: feeds, transfers, callbacks."""
  return tuple(
    i.name
    for i in instructions(text)
    if (i.opcode in HOST and 'is_host_transfer=false' not in i.rest)
    or (i.opcode == 'custom-call' and re.search(r'target="\w*callback', i.rest))
  )
