"""`evaluation.json`: bounds, and scores of sets of samples."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax.storage import results

NAME = 'evaluation.json'
BOUNDS = 'bounds'
MARK = 'bits_per_dim'  # marks a file of earlier versions, which is one bound
SCORES = 'scores_of_samples'
# Keys of a bound's results; the other keys say how they were computed.
FOUND = (
  *('bits_per_dim', 'standard_error', 'L_T', 'L_1_to_T-1', 'L_0'),
  *('rate', 'distortion', 'rmse', 'L_t_by_t'),
)


def weights_key(config: ConfigDict) -> str:
  """The key of the recipe that selects the weights to evaluate."""
  return 'evaluate.weights' if config.evaluate.weights else 'sampler.weights'


def read(folder: pathlib.Path) -> dict[str, Any]:
  """Reads the bounds and scores of a workdir; {} if there are none."""
  return results.read(folder / NAME, BOUNDS, MARK)


def write_bound(
  folder: pathlib.Path, bound: dict[str, Any]
) -> list[dict[str, Any]]:
  """Adds a bound, replacing one with the same settings; returns all."""
  return results.add(folder / NAME, BOUNDS, MARK, bound, FOUND)


def write_scores(
  folder: pathlib.Path, entry: dict[str, Any]
) -> list[dict[str, Any]]:
  """Adds scores, replacing those with the same settings; returns all."""
  found = results.add(folder / NAME, SCORES, MARK, entry, ['scores'])
  return sorted(found, key=lambda e: e['step'])


def table(entries: list[dict[str, Any]]) -> str:
  """Formats scores as the Markdown table of docs/evaluation.md."""
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
      f'{fid(e)[0]} {fid(e)[1]:.2f}, IS {inception_score(e)}',
    )
    rows.append(f'| {" | ".join(cells)} |')
  return '\n'.join(rows)


def least(entries: list[dict[str, Any]]) -> tuple[str, float, int]:
  """Name, value and step of the best FID."""
  entry = min(entries, key=lambda e: fid(e)[1])
  return *fid(entry), entry['step']


def best(entries: list[dict[str, Any]], entry: dict[str, Any]) -> str:
  """Best FID of several checkpoints with `entry`'s settings; '' if one."""
  alike = [e for e in entries if _protocol(e) == _protocol(entry)]
  if len(alike) < 2:
    return ''
  name, value, step = least(alike)
  return f'\nbest of {len(alike)}: {name} {value:.3f} at step {step}'


def details(entry: dict[str, Any]) -> str:
  """Formats all scores of one entry as text."""
  found = dict(entry['scores'])
  lines = [f'{name:<21}{found[name]:.3f}' for name in found if 'FID' in name]
  lines.append(f'{"IS":<21}{inception_score(entry)}')
  if 'KID' in found:
    k = found['KID_images']
    error = found['KID_error']
    lines += [
      f'{"KID":<21}{found["KID"]:.5f} ± {error:.5f}',
      f'{"precision, recall":<21}{found["precision"]:.3f}, '
      f'{found["recall"]:.3f}',
      f'{"":<21}(these three from {k} images of each set)',
    ]
  return '\n'.join(lines)


def _protocol(entry: dict[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in entry.items() if k not in ('step', 'scores')}


def fid(entry: dict[str, Any]) -> tuple[str, float]:
  """Name and value of the FID; the name is FID@N for few samples."""
  return next(
    (name, value)
    for name, value in entry['scores'].items()
    if name.startswith('FID')
  )


def inception_score(entry: dict[str, Any]) -> str:
  """Formats the inception score and its standard deviation."""
  scores = entry['scores']
  return f'{scores["IS"]:.2f} ± {scores["IS_deviation"]:.2f}'
