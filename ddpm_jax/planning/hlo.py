"""Memory, work and collectives of a compiled program.

All numbers are for one device. Nothing is run, so the program may be compiled
for devices that this machine does not have.
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

# `ROOT %name = type opcode(operands), attributes`. The opcode is the first
# lowercase word before a parenthesis; a layout like `{0:T(8)(2,1)}` has none.
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
  """The collectives of one kind in the text of a program.

  Bytes are those of the operands or of the outputs, whichever are larger: of
  the whole array that is reduced, gathered or moved. A collective in a loop is
  counted once, although it runs in every iteration.
  """

  number: int
  bytes: int
  in_loops: int  # of `number`
  bytes_in_loops: int  # of `bytes`


class Account(NamedTuple):
  """Memory, in bytes, and work of one device; None is unknown.

  `flops` and `bytes` are the compiler's counts, which include the body of a
  loop once, however often it runs.
  """

  arguments: int
  outputs: int  # including donated ones
  donated: int  # outputs that reuse the memory of arguments
  temporaries: int
  code: int
  peak: int  # all of the above at once
  flops: float | None
  bytes: float | None  # read and written
  optimal_seconds: float | None  # by the compiler's model of the device
  collectives: dict[str, Collective]  # by kind, only those present
  host_transfers: tuple[str, ...]  # instructions that communicate with the host


def of(compiled: Any) -> Account:
  """Returns the account of `jax.jit(f).lower(...).compile()`."""
  memory, text = compiled.memory_analysis(), compiled.as_text()
  cost = compiled.cost_analysis() or {}
  # Some versions of JAX return a list with one element.
  cost = cost[0] if isinstance(cost, list) else cost

  def known(key: str) -> float | None:
    value = cost.get(key, -1.0)
    return value if value >= 0 else None  # negative: not known

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
  """Yields the instructions of a program in HLO text (`compiled.as_text()`)."""
  computation = ''
  for line in text.splitlines():
    if head := COMPUTATION.match(line):
      computation = head[1]
    elif found := INSTRUCTION.match(line):
      yield Instruction(computation, *found.groups())


def collectives(text: str) -> dict[str, Collective]:
  """Counts collectives by kind; an asynchronous start and done count as one."""
  program = list(instructions(text))
  sizes = {i.name: type_bytes(i.type) for i in program}
  looped = in_loops(program)
  found: dict[str, Collective] = {}
  for i in program:
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
    out -= into  # the type of a start includes its operands
  return max(into, out)


def operands(rest: str) -> list[str]:
  """Operand names in text such as `%a, f32[2]{0} %b), attributes`."""
  depth = 0
  for end, character in enumerate(rest):
    depth += (character == '(') - (character == ')')
    if depth < 0:
      return re.findall(r'%([\w.-]+)', rest[:end])
  return re.findall(r'%([\w.-]+)', rest)


def type_bytes(text: str) -> int:
  """Bytes of an array or tuple type such as `(f32[8,32]{1,0}, u32[])`."""
  total = 0
  for name, bits, shape in ARRAY.findall(text):
    size = 8 if name == 'pred' else int(bits)
    for side in shape.replace('<=', '').split(','):
      size *= int(side or 1)
    total += -(-size // 8)
  return total


def in_loops(program: list[Instruction]) -> set[str]:
  """Names of the computations that run in every iteration of some loop."""
  calls: dict[str, set[str]] = {}
  waiting = []
  for i in program:
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
  """Names of instructions that wait for the host: feeds, sends, callbacks."""
  return tuple(
    i.name
    for i in instructions(text)
    if (i.opcode in HOST and 'is_host_transfer=false' not in i.rest)
    or (i.opcode == 'custom-call' and re.search(r'target="\w*callback', i.rest))
  )
