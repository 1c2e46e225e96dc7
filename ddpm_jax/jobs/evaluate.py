"""`--mode=evaluate`: measures a run in bits per dimension, or by FID.

By default it computes the bound on the likelihood of the data; with
`--num_samples`, the scores of that many samples; with `--images`, the scores of
existing images. All results are kept in `evaluation.json`.
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
  reads=('sampler.variance',),  # by the bound, whichever the sampler is
)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.num_samples(
    p, 'score this many samples: papers use 50000 (default: the bound)'
  )
  command.output(p, 'where to keep the samples that are scored')
  p.add_argument(
    '--inception',
    type=command.local_path,
    metavar='FILE',
    help='the weights of Inception-v3, .safetensors or .pth, which the scores '
    'of images need',
  )
  p.add_argument(
    '--reference',
    type=command.local_path,
    metavar='FILE.npz',
    help='statistics to compare with, `mu` and `sigma` (default: those of the '
    'data set, computed once)',
  )
  p.add_argument(
    '--images',
    type=command.local_path,
    metavar='PATH',
    help='score these images, a folder or an .npz, in place of samples',
  )
  p.add_argument(
    '--step',
    type=int,
    metavar='N',
    help='the step of the checkpoint to evaluate (default: the newest)',
  )


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Evaluates the run, prints the results and adds them to `--workdir`.

  Raises:
    UserError: If flags, files or the recipe are not valid.
  """
  if args.images and args.num_samples:
    raise errors.UserError(
      '--images scores existing images, and --num_samples draws new ones: set '
      'one of them'
    )
  dataset.split_to_evaluate(config)  # refuses a split that does not exist
  if args.images:
    scores.of_images(config, args)
  elif args.num_samples:
    scores.of_samples(config, args)
  elif args.inception or args.reference:
    raise errors.UserError(
      '--inception and --reference are for scores of images: add '
      '--num_samples=50000 or --images'
    )
  else:
    bound.run(config, args)
