"""FID and other scores of a run's samples, or of images from elsewhere."""

import argparse
import functools
import json
import zlib

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import drawing
from ddpm_jax import errors
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax import samples
from ddpm_jax import sampling
from ddpm_jax.data import unresized
from ddpm_jax.evaluation import features
from ddpm_jax.evaluation import record
from ddpm_jax.evaluation import reference
from ddpm_jax.metrics import fidelity
from ddpm_jax.metrics import weights as weights_file
from ddpm_jax.parallel import meshes
from ddpm_jax.parallel import processes
from ddpm_jax.storage import fingerprint
from ddpm_jax.storage import logs
from ddpm_jax.storage import outputs
from ddpm_jax.storage import paths
from ddpm_jax.storage import results


def of_samples(config: ConfigDict, args: argparse.Namespace) -> None:
  """Draws and scores `--num_samples` images.

  Finished batches are kept in the workdir until all are done, so that an
  interrupted evaluation resumes. Writes `evaluation.json`, and the images to
  `--output` if given.

  Raises:
    UserError: If something is missing or not valid, before anything is drawn.
  """
  count = args.num_samples
  trained = check(config, args, count)
  if args.output:
    outputs.prepare(args.output)
  engine = build.engine(config, local=True)
  seed = config.seed if args.seed is None else args.seed
  shard = functools.partial(meshes.shard_rows, mesh=engine.mesh)
  sampler = sampling.sampler(config, shard=shard)
  size, draw = drawing.drawer(config, engine, count, sampler)
  kind, step, params = runs.restore(
    *(config, engine.mesh, args.workdir, args.step),
    key=record.weights_key(config),
  )
  about = samples.description(config, args, kind, step, [])
  if args.output:
    outputs.check(args.output, count, about)
  extract = features.extractor(config, engine, trained.params, size)
  real, against = reference_of(config, args, extract, trained)

  made = {
    'step': step,
    'weights': kind,
    'sampler': config.sampler.name,
    'sampler_steps': config.sampler.steps,
    'sampler_options': samples.options(config),
    'seed': seed,
    'resize': config.evaluate.resize,
    'inception': trained.digest,
  }
  logs.say(
    f'drawing {count} images with the {kind} weights of step {step}, '
    f'{config.sampler.steps} steps of {config.sampler.name} each'
  )
  key = [made, size, bool(args.output)]
  key += [fingerprint.crc32(fingerprint.describe(params))]
  digest = zlib.crc32(json.dumps(key).encode())
  folder = args.workdir / f'evaluation_parts_{digest:08x}'

  def batch(start: int, stop: int) -> np.ndarray:
    return np.asarray(draw(params, seed, start).images[: stop - start])

  spans = features.spans(count, size)
  features.in_parts(folder, spans, batch, extract, bool(args.output))
  if not processes.is_primary():
    return
  kept = fidelity.chosen(count, config.evaluate.neighbours)
  sums = features.add_up(features.parts(folder, spans), kept)
  assert sums
  entry = {
    **made,
    'samples': count,
    'reference': against,
    'scores': errors.finite(
      fidelity.scores(fidelity.statistics(sums), real), 'score'
    ),
  }
  entries = record.write_scores(args.workdir, entry)
  if args.output:
    drawn = logs.watched(features.images(folder, spans), 'saving', count)
    outputs.save(args.output, drawn, count, about)
    logs.say(f'{count} images: {args.output}')
  paths.remove_tree(folder)
  print(record.table(entries) + record.best(entries, entry))
  print(record.details(entry))
  logs.say(f'all results          {args.workdir}/{record.NAME}')


def of_images(config: ConfigDict, args: argparse.Namespace) -> None:
  """Scores the images of `--images`; writes JSON to `--output` if given.

  Raises:
    UserError: If something is missing or not valid.
  """
  if args.step is not None:
    raise errors.UserError('--images uses no checkpoint: leave --step out')
  source, shape = unresized.load(args.images, config.data.max_value)
  trained = check(config, args, len(source), shape)
  if args.output and args.output.suffix != '.json':
    raise errors.UserError(f'--output={args.output} must end in .json')
  engine = build.engine(config, local=True)
  size = config.evaluate.batch_size
  extract = features.extractor(config, engine, trained.params, size)
  real, against = reference_of(config, args, extract, trained)
  logs.say(f'scoring {len(source)} images of {args.images}')
  kept = fidelity.chosen(len(source), config.evaluate.neighbours)
  parts = features.of_source(source, len(source), size, extract)
  mine = features.add_up(parts, kept)
  sums = features.everyones(mine, reference.cache(config, args.workdir))
  if not processes.is_primary():
    return
  entry = {
    'images': str(args.images),
    'resize': config.evaluate.resize,
    'inception': trained.digest,
    'samples': len(source),
    'reference': against,
    'scores': errors.finite(
      fidelity.scores(fidelity.statistics(sums), real), 'score'
    ),
  }
  if args.output:
    text = results.text(entry, args.output)
    with paths.atomic_write(args.output) as part:
      part.write_text(text)
  print(record.table([entry]))
  print(record.details(entry))


def check(
  config: ConfigDict,
  args: argparse.Namespace,
  count: int,
  shape: tuple[int, ...] = (),
) -> weights_file.Weights:
  """Checks early what would fail late; returns Inception's weights.

  Args:
    config: The recipe.
    args: The flags.
    count: Number of images to score.
    shape: (H, W, C), by default that of the recipe.

  Raises:
    UserError: If the scores cannot be computed.
  """
  features.features(config)  # raises if evaluate.resize is unknown
  data = recipe.image_size(config)
  if not data:
    raise errors.UserError('FID needs images, and these data are points')
  H, W, C = shape or recipe.shape(config)
  if data != (H, W) and not args.reference:
    raise errors.UserError(
      f'the images are {H}x{W}, those of the recipe {data[0]}x{data[1]}: name '
      'the --config or the --reference of the data to compare with'
    )
  if count < 2:
    raise errors.UserError('scores need 2 images, and mean little below 10000')
  if not args.inception:
    raise weights_file.missing()
  if C == 1:
    logs.say('gray images: Inception receives them as RGB')
  return weights_file.load(args.inception)


def reference_of(
  config: ConfigDict,
  args: argparse.Namespace,
  extract: features.Extract,
  trained: weights_file.Weights,
) -> tuple[fidelity.Statistics, str]:
  """Returns the statistics to compare with, and their title."""
  if args.reference:
    return reference.from_file(args.reference, config, trained.digest)
  return reference.from_data(config, args.workdir, extract, trained.digest)
