"""`--mode=compare`: tables of the runs in a folder."""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax.jobs import score
from ddpm_jax.jobs.evaluate import record
from ddpm_jax.runtime import results

needs_config = False


class Row(NamedTuple):
  """One measurement of one run; cells by the title of their column."""

  run: str
  step: int
  how: dict[str, str]  # it was made: may be compared where this is the same
  what: dict[str, str]  # was found


def run(config: ConfigDict | None, args: argparse.Namespace) -> None:
  """Prints, in Markdown, what `evaluate` and `score` found in the runs.

  A table for each kind of measurement, a row for each one that was made; those
  made in the same way stand together.

  Raises:
    UserError: if there are none in `--workdir`.
  """
  del config
  above = args.workdir or pathlib.Path('runs')
  tables = {
    title: [
      row(folder.name, entry)
      for folder in sorted(path for path in above.glob('*') if path.is_dir())
      for entry in entries(folder)
    ]
    for title, (entries, row) in KINDS.items()
  }
  if not any(tables.values()):
    raise errors.UserError(
      f'{above} holds no run that was evaluated or scored: name the '
      'folder above them with --workdir'
    )
  shown = [f'{title}\n\n{table(x)}' for title, x in tables.items() if x]
  print('\n\n'.join(shown))


def table(rows: list[Row]) -> str:
  """In Markdown."""
  rows = sorted(rows, key=lambda r: (list(r.how.values()), r.run, r.step))
  first = rows[0]
  titles = ['run', 'step', *first.how, *first.what]
  lines = [titles, ['---'] * len(titles)]
  lines += [
    [r.run, str(r.step), *r.how.values(), *r.what.values()] for r in rows
  ]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def bounds(folder: pathlib.Path) -> list[results.Entry]:
  return record.read(folder).get(record.BOUNDS, [])


def scores_of_samples(folder: pathlib.Path) -> list[results.Entry]:
  return record.read(folder).get(record.SCORES, [])


def bound(run: str, e: results.Entry) -> Row:
  how = {
    **texts(e, 'data', 'weights', 'split', 'images'),
    'draws': draws(e),
    'σ²': str(e.get('variance', '')),
    **texts(e, 'seed'),
  }
  numbers = {
    'bits/dim ≤': 'bits_per_dim',
    '±': 'standard_error',
    'rate': 'rate',
    'distortion': 'distortion',
  }
  what = {k: f'{e[v]:.3f}' if v in e else '' for k, v in numbers.items()}
  return Row(run, e.get('step', 0), how, what)


def draws(entry: results.Entry) -> str:
  """Of the times: how many for an image."""
  if entry.get('exact_in_t'):
    return 'all t'
  times = entry.get('times_an_image')
  return '' if times is None else str(times - 1)


def small_data_score(run: str, e: results.Entry) -> Row:
  how = {
    **texts(e, 'weights'),
    'samples': str(e['fake_images']),
    'sampler': sampler(e),
    'seed': str(e['seed']),
  }
  numbers = {
    'Fréchet': 'frechet_distance',
    'precision': 'precision',
    'recall': 'recall',
    'sure': 'sure_share',
  }
  return Row(
    run, e['step'], how, {k: f'{e[v]:.3f}' for k, v in numbers.items()}
  )


def inception_score(run: str, e: results.Entry) -> Row:
  how = {
    **texts(e, 'weights', 'samples'),
    'sampler': sampler(e),
    'against': str(e['reference']),
    **texts(e, 'seed'),
  }
  name, fid = record.fid(e)
  what = {'FID': f'{name} {fid:.2f}', 'IS': record.inception_score(e)}
  return Row(run, e['step'], how, what)


def texts(entry: results.Entry, *keys: str) -> dict[str, str]:
  """Cells; empty where an earlier version did not say."""
  return {key: str(entry.get(key, '')) for key in keys}


def sampler(entry: results.Entry) -> str:
  """Name, steps, and the options that are not the recipe's own."""
  told = f'{entry["sampler"]}, {entry["sampler_steps"]} steps'
  options = entry.get('sampler_options', {})
  if options.get('guidance', 1) != 1:
    told += f', guidance {options["guidance"]:g}'
  return told


KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Row]]] = {
  'Bound on the likelihood': (bounds, bound),
  'Small-data score': (score.read, small_data_score),
  'Scores of Inception': (scores_of_samples, inception_score),
}
