"""`--mode=train`: trains a run, or resumes it."""

import argparse
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import trainer

JOB = command.Job('trains a run, or resumes it', run=False, processes=True)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.num_samples(p, 'images in samples.png (default: 64)')
  p.add_argument(
    '--allow',
    action='append',
    choices=['optimizer', 'data'],
    help='what may differ from the run in --workdir: the keys of '
    'config.optimizer, or the data; recorded in changes.json; may be repeated',
  )
  p.set_defaults(num_samples=64, allow=[])


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Trains to `config.steps`; see `trainer.train`."""
  if jax.process_count() > 1 and not args.workdir:
    raise errors.UserError('several processes need one --workdir: name it')
  run = trainer.train(
    config,
    args.workdir,
    name=pathlib.Path(args.config or '').stem,
    allow=args.allow,
    num_samples=args.num_samples,
    parallel=args.parallel,
  )
  if args.stopped_code and run.step < config.steps:
    raise SystemExit(args.stopped_code)
