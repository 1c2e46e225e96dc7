"""`--mode=compare`: one table of the runs in a folder."""

import argparse
import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax.jobs.evaluate import record

# What is shown: the file, the key, the title, the form.
COLUMNS = (
  ('evaluation.json', 'bits_per_dim', 'bits/dim ≤', '.3f'),
  ('evaluation.json', 'standard_error', '±', '.3f'),
  ('evaluation.json', 'rate', 'rate', '.3f'),
  ('evaluation.json', 'distortion', 'distortion', '.3f'),
  ('score.json', 'frechet_distance', 'Fréchet', '.3f'),
  ('score.json', 'precision', 'precision', '.3f'),
  ('score.json', 'recall', 'recall', '.3f'),
  ('score.json', 'sure_share', 'sure', '.3f'),
)
needs_config = False


def run(config: ConfigDict | None, args: argparse.Namespace) -> None:
  """Prints, in Markdown, what `evaluate` and `score` found in the runs.

  Raises:
    UserError: if there are none in `--workdir`.
  """
  del config
  above = args.workdir or pathlib.Path('runs')
  folders = sorted(
    {file.parent for name, *_ in COLUMNS for file in above.glob(f'*/{name}')}
  )
  if not folders:
    raise errors.UserError(
      f'{above} holds no run that was evaluated or scored: name the '
      'folder above them with --workdir'
    )
  titles = ['run', *(title for *_, title, _ in COLUMNS), 'best FID']
  print(f'| {" | ".join(titles)} |\n|{"---|" * len(titles)}')
  for folder in folders:
    cells = [folder.name]
    for name, key, _, form in COLUMNS:
      value = found(folder / name).get(key)
      cells.append('' if value is None else format(value, form))
    cells.append(best_fid(folder))
    print(f'| {" | ".join(cells)} |')


def best_fid(folder: pathlib.Path) -> str:
  """Of the checkpoints that were scored with the most samples."""
  entries = record.read(folder).get(record.SCORES, [])
  if not entries:
    return ''
  most = max(entry['samples'] for entry in entries)
  name, value, step = record.least(
    [entry for entry in entries if entry['samples'] == most]
  )
  return f'{name} {value:.2f} (step {step})'


def found(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text()) if path.exists() else {}
