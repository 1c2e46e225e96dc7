"""Formats a plan as text."""

from collections.abc import Iterator
from typing import Any

from ddpm_jax.planning import programs


def markdown(found: dict[str, Any]) -> str:
  """Returns a plan as a Markdown table with notes below it."""
  draw = found['sampler']
  mesh = ' x '.join(f'{k} {n}' for k, n in found['mesh'].items())
  memory = found['memory_bytes']
  fits = {True: 'yes', False: 'NO', None: 'not known'}
  rows = [
    ('fits', lambda x: fits[x.get('train_fits', x['fits'])]),
    ('state', lambda x: size(x['state_bytes'])),
    ('activations', lambda x: size(x['activation_bytes'])),
    (
      'peak' + (f', of {size(memory)}' if memory else ''),
      lambda x: size(x['peak_bytes']),
    ),
    ('FLOPs', lambda x: number(x['flops'])),
    ('bytes moved', lambda x: number(x['bytes'])),
    ('collectives', collectives),
    ('transfers to the host', lambda x: number(x['host_transfers'])),
    ('roofline', roofline),
    ("the compiler's model", lambda x: duration(x['optimal_seconds'])),
    ('images/s, all devices', lambda x: number(x['images_per_second'])),
    ('compiled in', lambda x: f'{x["compile_seconds"]:.0f} s'),
  ]
  lines = [
    f'{found["config"]} on {found["topology"]}: {found["devices"]} device(s), '
    f'{mesh}',
    '',
    f'| of one device | training step, {found["images"]} images | sampler, '
    f'{draw["images"]} images |',
    '|---|---|---|',
    *(f'| {name} | {of(found)} | {of(draw)} |' for name, of in rows),
    f'| hours | to step {found["steps"]:,}: {hours(found["train_hours"])} | '
    f'{programs.IMAGES:,} images: {hours(draw["hours"])} |',
    '',
    *notes(found),
  ]
  return '\n'.join(lines)


def notes(found: dict[str, Any]) -> Iterator[str]:
  if found['roofline_seconds']:
    yield (
      'Times are lower bounds: no program reaches the roofline, and it does '
      'not include the collectives.'
    )
  elif found['memory_bytes'] and found['train_fits']:
    yield (
      'The GPU compiler does not count FLOPs or bytes, and its memory does not '
      'include the workspace of cuDNN.'
    )
  if not found['optimized']:
    yield (
      'Compiled at O0: FLOPs and collectives are those of a run, and memory is '
      'nearly so. --optimize compiles as a run does, which takes long.'
    )
  for what, of in ('training step', found), ('sampler', found['sampler']):
    if advised := of['advice']:
      word = 'fits' if advised['fits'] else 'does not fit either'
      yield (
        f'With {advised["change"]} the {what} {word}: '
        f'{size(advised["peak_bytes"])} as compiled; the estimate was '
        f'{size(advised["estimated_bytes"]) or "not possible"}.'
      )


def collectives(x: dict[str, Any]) -> str:
  if x['collectives'] is None:
    return ''
  return (
    ', '.join(
      f'{c["count"]:,} {kind} ({size(c["bytes"])})'
      for kind, c in sorted(x['collectives'].items())
    )
    or 'none'
  )


def roofline(x: dict[str, Any]) -> str:
  if not x['roofline_seconds']:
    return ''
  return f'{duration(x["roofline_seconds"])}, {x["bound_by"]}'


def size(count: float | None) -> str:
  if count is None:
    return ''
  for unit, bytes_each in (('GiB', 2**30), ('MiB', 2**20), ('KiB', 2**10)):
    if count >= bytes_each:
      return f'{count / bytes_each:.4g} {unit}'
  return f'{count:.0f} bytes'


def number(count: float | None) -> str:
  return '' if count is None else f'{count:.3g}'


def duration(seconds: float | None) -> str:
  if seconds is None:
    return ''
  return f'{seconds * 1e3:.3g} ms' if seconds < 1 else f'{seconds:.3g} s'


def hours(count: float | None) -> str:
  return 'not known' if count is None else f'{count:.3g}'
