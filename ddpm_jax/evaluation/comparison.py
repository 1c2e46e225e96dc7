"""Tables of the results of several runs."""

import logging
import pathlib
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from ddpm_jax.evaluation import record
from ddpm_jax.evaluation import small_data
from ddpm_jax.storage import results


class Row(NamedTuple):
  """One measurement of one run; the dicts are {column: cell}."""

  run: str
  step: int  # -1: not known
  settings: dict[str, str]  # Rows with the same ones are comparable.
  found: dict[str, str]


def row_of(
  row: Callable[[str, results.Entry], Row],
  folder: pathlib.Path,
  entry: results.Entry,
) -> Row | None:
  """Returns the row of an entry; warns and returns None if it is not valid."""
  try:
    return row(folder.name, entry)
  except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
    reason = f'no {e}' if isinstance(e, KeyError) else str(e)
    logging.warning('%s: an entry is left out (%s)', folder, reason)
    return None


def table(rows: list[Row]) -> str:
  """Formats rows as a table in Markdown."""
  rows = sorted(rows, key=lambda r: (list(r.settings.values()), r.run, r.step))
  first = rows[0]
  titles = ['run', 'step', *first.settings, *first.found]
  lines = [titles, ['---'] * len(titles)]
  lines += [
    [
      r.run,
      '' if r.step < 0 else str(r.step),
      *r.settings.values(),
      *r.found.values(),
    ]
    for r in rows
  ]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def bounds(folder: pathlib.Path) -> list[results.Entry]:
  return record.read(folder).get(record.BOUNDS, [])


def scores_of_samples(folder: pathlib.Path) -> list[results.Entry]:
  return record.read(folder).get(record.SCORES, [])


def bound(run: str, e: results.Entry) -> Row:
  settings = {
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
  return Row(run, step(e), settings, numbers(e, titles))


def draws(e: results.Entry) -> str:
  return str(e['times_an_image'] - 1) if 'times_an_image' in e else ''


def small_data_score(run: str, e: results.Entry) -> Row:
  settings = {
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
  return Row(run, step(e), settings, numbers(e, titles))


def inception_score(run: str, e: results.Entry) -> Row:
  settings = {
    **texts(e, 'weights', 'samples'),
    'sampler': sampler(e),
    'against': str(e.get('reference', '')),
    **texts(e, 'seed'),
  }
  name, fid = record.fid(e)
  found = {'FID': f'{name} {fid:.2f}', 'IS': record.inception_score(e)}
  return Row(run, step(e), settings, found)


def step(entry: results.Entry) -> int:
  """Returns the step of an entry, or -1 if it has none."""
  found = entry.get('step', -1)
  if not isinstance(found, int):
    raise TypeError(f'step {found!r} is not an integer')
  return found


def texts(entry: results.Entry, *keys: str) -> dict[str, str]:
  """Returns the cells of keys; empty if an earlier version did not save one."""
  return {key: str(entry.get(key, '')) for key in keys}


def numbers(entry: results.Entry, titles: dict[str, str]) -> dict[str, str]:
  """Like `texts`, for numbers; `titles` is {column: key}."""
  return {
    title: f'{entry[key]:.3f}' if key in entry else ''
    for title, key in titles.items()
  }


def sampler(entry: results.Entry) -> str:
  """Returns the name and steps of the sampler, and guidance if it is used."""
  if 'sampler' not in entry:
    return ''
  cell = f'{entry["sampler"]}, {entry["sampler_steps"]} steps'
  options = entry.get('sampler_options', {})
  if options.get('guidance', 1) != 1:
    cell += f', guidance {options["guidance"]:g}'
  return cell


KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Row]]] = {
  'Bound on the likelihood': (bounds, bound),
  'Small-data score': (small_data.read, small_data_score),
  'Scores of Inception': (scores_of_samples, inception_score),
}
