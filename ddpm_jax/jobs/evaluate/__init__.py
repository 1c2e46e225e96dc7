"""`--mode=evaluate`: how good a run is, in bits a dimension or in FID.

Without `--num_samples` it is the bound on the likelihood, of the data; with it,
the scores of so many samples; with `--images`, those of images made elsewhere.
All that was found stands in `evaluation.json`.
"""

import argparse

from ml_collections import ConfigDict

from ddpm_jax import dataset
from ddpm_jax import errors
from ddpm_jax.jobs.evaluate import bound
from ddpm_jax.jobs.evaluate import scores

many_processes = True


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
