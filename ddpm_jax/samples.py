"""Samples: what a command line asks for, and how they are described."""

import argparse
import pathlib
import re
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import dataset
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import recipe
from ddpm_jax.storage import outputs
from ddpm_jax.storage import workdir


def condition_flags(p: Any) -> None:
  """Adds the flags that say what the images shall be of."""
  p.add_argument(
    '--prompt',
    action='append',
    metavar='TEXT',
    help='what the images shall be of, for a model of texts; may be repeated. '
    '--num_samples is then of each',
  )
  p.add_argument(
    '--prompts',
    type=command.local_path,
    metavar='FILE',
    help='the same, a line each',
  )
  p.add_argument(
    '--label',
    action='append',
    metavar='CLASS',
    help='the class, for a model of classes: a name of `classes.json` in '
    '--workdir, or else a number; may be repeated (default: all take turns)',
  )


def settle(args: argparse.Namespace) -> None:
  """Sets the number of samples, if the command line does not."""
  asked = args.prompt or args.prompts or args.label
  args.num_samples = args.num_samples or (8 if asked else 64)


def description(
  config: ConfigDict,
  args: argparse.Namespace,
  kind: str,
  step: int,
  wanted: list[str],
) -> outputs.About:
  """How images are made, to be kept beside them."""
  about = {
    'mode': args.mode,
    'run': str(args.workdir.resolve()),
    'step': step,
    'weights': kind,
    'seed': config.seed if args.seed is None else args.seed,
    'sampler': config.sampler.name,
    'steps': config.sampler.steps,
    **options(config),
  }
  condition = 'labels' if config.condition.name == 'label' else 'prompts'
  if wanted:
    about[condition] = wanted
  if len(wanted) > 1:
    n = args.num_samples
    about['order'] = f'image i is of {condition}[i // {n}]'
  elif not wanted and condition == 'labels':
    about['order'] = f'image i is of class i % {config.condition.classes}'
  return about


def options(config: ConfigDict) -> dict[str, Any]:
  """The keys of the sampler, beside name and steps, that change images."""
  every = recipe.to_json(config)['sampler']
  others = 'name', 'steps', 'weights', 'batch_size'
  return {key: x for key, x in every.items() if key not in others}


def settings(
  config: ConfigDict, kind: str, step: int, seed: int, wanted: list[str]
) -> str:
  """The main settings of samples, as a part of a file's name."""
  c = config.sampler
  parts = [f'seed{seed}', f'step{step}', f'{c.name}{c.steps}']
  if kind != 'EMA':
    parts.append(kind)
  if c.spacing != 'linear' and c.steps != config.schedule.T:
    parts.append(c.spacing)
  if c.eta:
    parts.append(f'eta{c.eta:g}')
  if config.condition.name and c.guidance != 1:
    parts.append(f'guidance{c.guidance:g}')
  if wanted:
    parts.append(re.sub(r'\W+', '-', '-'.join(wanted))[:40])
  return '_'.join(parts)


def asked(
  config: ConfigDict, args: argparse.Namespace
) -> tuple[list[str], Any]:
  """What `--prompt`, `--prompts` or `--label` ask for, and as conditions.

  The conditions have a row for each image: `--num_samples` of each in turn.

  Raises:
    UserError: if the model takes nothing of the kind.
  """
  prompts, labels = list(args.prompt or []), list(args.label or [])
  if args.prompts:
    prompts += read_prompts(args.prompts)
  rows = dataset.conditions(config, prompts, labels, folder=args.workdir)
  if labels:
    saved = workdir.read_classes(args.workdir) or ()
    labels = [dataset.class_title(config, n, saved) for n in rows.tolist()]
  each = jax.tree.map(lambda x: np.repeat(x, args.num_samples, axis=0), rows)
  return prompts or labels, each


def read_prompts(path: pathlib.Path) -> list[str]:
  try:
    lines = path.read_text(encoding='utf-8').splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(f'--prompts={path}: {error}') from None
  prompts = [line.strip() for line in lines if line.strip()]
  if not prompts:
    raise errors.UserError(f'--prompts={path} holds no text')
  return prompts
