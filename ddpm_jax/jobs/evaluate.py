"""`--mode=evaluate`: how good a run is, in bits a dimension or in FID.

Without `--num_samples` it is the bound on the likelihood, of the data; with it,
the scores of so many samples; with `--images`, those of images made elsewhere.
All that was found stands in `evaluation.json`.
"""

import argparse
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import dataset
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax.evaluation import bound
from ddpm_jax.evaluation import scores

JOB = command.Job(
  'measures a run: bits/dim, or FID and the like',
  unless='images',
  writes=True,
  processes=True,
  reads=('sampler.variance',),  # the bound does, whatever the sampler
)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.num_samples(
    p, 'score this many samples: the papers take 50000 (default: the bound)'
  )
  command.output(p, 'where the samples that are scored go, if they are kept')
  p.add_argument(
    '--inception',
    type=command.local_path,
    metavar='FILE',
    help='the weights of Inception-v3, .safetensors or .pth: FID and the like '
    'need them',
  )
  p.add_argument(
    '--reference',
    type=command.local_path,
    metavar='FILE.npz',
    help='statistics to compare with, `mu` and `sigma`; default: of the data '
    'set, computed once',
  )
  p.add_argument(
    '--images',
    type=command.local_path,
    metavar='PATH',
    help='score these, a folder or an .npz, in the place of samples',
  )
  p.add_argument(
    '--step',
    type=int,
    metavar='N',
    help='of the checkpoint to evaluate (default: the newest)',
  )


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Evaluates, prints, and writes into `--workdir`.

  Raises:
    UserError: for flags, files or a recipe that do not do.
  """
  if args.images and args.num_samples:
    raise errors.UserError(
      '--images scores all that there are, --num_samples draws from a run: '
      'name one of them'
    )
  dataset.split_to_evaluate(config)  # refuses a split that is not there
  if args.images:
    scores.of_images(config, args)
  elif args.num_samples:
    scores.of_samples(config, args)
  elif args.inception or args.reference:
    raise errors.UserError(
      '--inception and --reference are for scores of images: name '
      '--num_samples=50000 too, or --images'
    )
  else:
    bound.run(config, args)
