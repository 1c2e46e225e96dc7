"""`--mode=compare`: tables of the runs in a folder."""

import argparse
import pathlib
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax.evaluation import comparison

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
  """Prints the results of `evaluate` and `score` as tables in Markdown.

  There is one table for each kind of measurement, with one row for each
  measurement. Rows with the same settings are next to each other.

  Raises:
    UserError: If there are no results in `--workdir`.
  """
  del config
  above = args.workdir or pathlib.Path('runs')
  tables = {
    title: [
      made
      for folder in sorted(path for path in above.glob('*') if path.is_dir())
      for entry in entries(folder)
      if (made := comparison.row_of(row, folder, entry))
    ]
    for title, (entries, row) in comparison.KINDS.items()
  }
  if not any(tables.values()):
    raise errors.UserError(
      f'{above} holds no run that was evaluated or scored: set --workdir to a '
      'folder of runs'
    )
  shown = [
    f'{title}\n\n{comparison.table(x)}' for title, x in tables.items() if x
  ]
  print('\n\n'.join(shown))
