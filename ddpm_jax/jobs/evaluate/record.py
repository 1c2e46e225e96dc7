"""`evaluation.json`: the bound, and the scores of each set of samples."""

import json
import pathlib
from typing import Any

from ddpm_jax import errors
from ddpm_jax.runtime import images

NAME = 'evaluation.json'
SCORES = 'scores_of_samples'


def read(folder: pathlib.Path) -> dict[str, Any]:
  """What was found in a workdir; {} if nothing was.

  Raises:
    UserError: if the file is damaged.
  """
  path = folder / NAME
  try:
    return json.loads(path.read_text()) if path.exists() else {}
  except ValueError as e:
    raise errors.UserError(f'{path} is damaged ({e}): remove it') from None


def write_bound(folder: pathlib.Path, bound: dict[str, Any]) -> None:
  """In the place of the last one; the scores stay."""
  scores = read(folder).get(SCORES)
  _write(folder / NAME, bound | ({SCORES: scores} if scores else {}))


def write_scores(
  folder: pathlib.Path, entry: dict[str, Any]
) -> list[dict[str, Any]]:
  """Adds an entry, in the place of one made in the same way; returns all."""

  def made(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if k != 'scores'}

  before = read(folder)
  entries = [e for e in before.get(SCORES, []) if made(e) != made(entry)]
  entries = sorted([*entries, entry], key=lambda e: e['step'])
  _write(folder / NAME, before | {SCORES: entries})
  return entries


def _write(path: pathlib.Path, values: dict[str, Any]) -> None:
  with images.whole(path) as part:
    part.write_text(json.dumps(values, indent=2) + '\n')


def table(entries: list[dict[str, Any]]) -> str:
  """Rows of the README's table of scores."""
  rows = [
    '| step | weights | sampler | samples | against | published | here |',
    '|---|---|---|---|---|---|---|',
  ]
  for e in entries:
    cells = (
      str(e.get('step', e.get('images'))),
      e.get('weights', ''),
      f'{e["sampler"]}, {e["sampler_steps"]} steps' if 'sampler' in e else '',
      str(e['samples']),
      e['reference'],
      '',
      f'{_fid(e)[0]} {_fid(e)[1]:.2f}, IS {_inception_score(e)}',
    )
    rows.append(f'| {" | ".join(cells)} |')
  return '\n'.join(rows)


def least(entries: list[dict[str, Any]]) -> tuple[str, float, int]:
  """Name, value and step of the best FID."""
  entry = min(entries, key=lambda e: _fid(e)[1])
  return *_fid(entry), entry['step']


def best(entries: list[dict[str, Any]], entry: dict[str, Any]) -> str:
  """The best FID over the checkpoints scored as `entry` was; '' if one."""
  alike = [e for e in entries if _protocol(e) == _protocol(entry)]
  if len(alike) < 2:
    return ''
  name, value, step = least(alike)
  return f'\nbest of {len(alike)}: {name} {value:.3f} at step {step}'


def details(entry: dict[str, Any]) -> str:
  """All scores of one entry, for a person."""
  found = dict(entry['scores'])
  lines = [f'{name:<21}{found[name]:.3f}' for name in found if 'FID' in name]
  lines.append(f'{"IS":<21}{_inception_score(entry)}')
  if 'KID' in found:
    k = found['KID_images']
    error = found['KID_error']
    lines += [
      f'{"KID":<21}{found["KID"]:.5f} ± {error:.5f}',
      f'{"precision, recall":<21}{found["precision"]:.3f}, '
      f'{found["recall"]:.3f}',
      f'{"":<21}(these three of {k} images of each side)',
    ]
  return '\n'.join(lines)


def _protocol(entry: dict[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in entry.items() if k not in ('step', 'scores')}


def _fid(entry: dict[str, Any]) -> tuple[str, float]:
  return next(
    (name, value)
    for name, value in entry['scores'].items()
    if name.startswith('FID')
  )


def _inception_score(entry: dict[str, Any]) -> str:
  scores = entry['scores']
  return f'{scores["IS"]:.2f} ± {scores["IS_deviation"]:.2f}'
