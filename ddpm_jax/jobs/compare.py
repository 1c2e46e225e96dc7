"""`--mode=compare`: tables of the runs in a folder."""

import argparse
import logging
import pathlib
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax.evaluation import record
from ddpm_jax.evaluation import small_data
from ddpm_jax.storage import results


class Row(NamedTuple):
  """One measurement of one run; cells by the title of their column."""

  run: str
  step: int  # -1: not known
  how: dict[str, str]  # it was made: may be compared where this is the same
  what: dict[str, str]  # was found


JOB = command.Job(
  'prints tables of the runs in a folder',
  run=False,
  recipe=False,
  devices='none',
)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  del p


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
      made
      for folder in sorted(path for path in above.glob('*') if path.is_dir())
      for entry in entries(folder)
      if (made := _row(row, folder, entry))
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


def _row(
  row: Callable[[str, results.Entry], Row],
  folder: pathlib.Path,
  entry: results.Entry,
) -> Row | None:
  """The row of an entry; None, and a warning, if it is not one of ours."""
  try:
    return row(folder.name, entry)
  except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
    reason = f'no {e}' if isinstance(e, KeyError) else str(e)
    logging.warning('%s: an entry is left out (%s)', folder, reason)
    return None


def table(rows: list[Row]) -> str:
  """In Markdown."""
  rows = sorted(rows, key=lambda r: (list(r.how.values()), r.run, r.step))
  first = rows[0]
  titles = ['run', 'step', *first.how, *first.what]
  lines = [titles, ['---'] * len(titles)]
  lines += [
    [
      r.run,
      '' if r.step < 0 else str(r.step),
      *r.how.values(),
      *r.what.values(),
    ]
    for r in rows
  ]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def bounds(folder: pathlib.Path) -> list[results.Entry]:
  return record.read(folder).get(record.BOUNDS, [])


def scores_of_samples(folder: pathlib.Path) -> list[results.Entry]:
  return record.read(folder).get(record.SCORES, [])


def bound(run: str, e: results.Entry) -> Row:
  how = {
    **texts(e, 'data', 'weights', 'split', 'images'),
    'draws': 'all t' if e.get('exact_in_t') else draws(e),
    'σ²': str(e.get('variance', '')),
    **texts(e, 'seed'),
  }
  titles = {
    'bits/dim ≤': 'bits_per_dim',
    '±': 'standard_error',
    'rate': 'rate',
    'distortion': 'distortion',
  }
  return Row(run, step(e), how, numbers(e, titles))


def draws(e: results.Entry) -> str:
  return str(e['times_an_image'] - 1) if 'times_an_image' in e else ''


def small_data_score(run: str, e: results.Entry) -> Row:
  how = {
    **texts(e, 'weights'),
    'samples': str(e.get('fake_images', '')),
    'sampler': sampler(e),
    **texts(e, 'seed'),
  }
  titles = {
    'Fréchet': 'frechet_distance',
    'precision': 'precision',
    'recall': 'recall',
    'sure': 'sure_share',
  }
  return Row(run, step(e), how, numbers(e, titles))


def inception_score(run: str, e: results.Entry) -> Row:
  how = {
    **texts(e, 'weights', 'samples'),
    'sampler': sampler(e),
    'against': str(e.get('reference', '')),
    **texts(e, 'seed'),
  }
  name, fid = record.fid(e)
  what = {'FID': f'{name} {fid:.2f}', 'IS': record.inception_score(e)}
  return Row(run, step(e), how, what)


def step(entry: results.Entry) -> int:
  """-1: it does not say."""
  found = entry.get('step', -1)
  if not isinstance(found, int):
    raise TypeError(f'step {found!r} is no integer')
  return found


def texts(entry: results.Entry, *keys: str) -> dict[str, str]:
  """Cells; empty where an earlier version did not say."""
  return {key: str(entry.get(key, '')) for key in keys}


def numbers(entry: results.Entry, titles: dict[str, str]) -> dict[str, str]:
  """Cells of numbers by title, of the keys of the entry; empty likewise."""
  return {
    title: f'{entry[key]:.3f}' if key in entry else ''
    for title, key in titles.items()
  }


def sampler(entry: results.Entry) -> str:
  """Name, steps, and the options that are not the recipe's own."""
  if 'sampler' not in entry:
    return ''
  told = f'{entry["sampler"]}, {entry["sampler_steps"]} steps'
  options = entry.get('sampler_options', {})
  if options.get('guidance', 1) != 1:
    told += f', guidance {options["guidance"]:g}'
  return told


KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Row]]] = {
  'Bound on the likelihood': (bounds, bound),
  'Small-data score': (small_data.read, small_data_score),
  'Scores of Inception': (scores_of_samples, inception_score),
}
