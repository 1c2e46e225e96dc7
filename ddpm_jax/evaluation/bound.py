"""The variational bound on the data, in bits per dimension."""

import argparse
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import dataset
from ddpm_jax import drawing
from ddpm_jax import errors
from ddpm_jax import plots
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax import sampling
from ddpm_jax.diffusion import likelihood
from ddpm_jax.evaluation import record
from ddpm_jax.evaluation import reference
from ddpm_jax.parallel import engines
from ddpm_jax.parallel import processes
from ddpm_jax.storage import logs


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Evaluates the bound; writes evaluation.json and .png, and prints a table.

  Raises:
    UserError: If there is no run in `--workdir`.
  """
  if args.output:
    raise errors.UserError(
      '--output is for images; evaluate writes into --workdir'
    )
  if not recipe.image_size(config):
    raise errors.UserError('bits/dim are defined for images, not for points')
  run = runs.load(
    *(config, args.workdir),
    seed=args.seed,
    step=args.step,
    key=record.weights_key(config),
  )
  source, split = dataset.source_to_evaluate(config, args.workdir)
  count = min(len(source), config.evaluate.images or len(source))
  draws, T = config.evaluate.draws, config.schedule.T
  times = f't = 1 and {draws} drawn' if draws else f'all {T}'
  logs.say(
    f'evaluating the {run.weights} weights of step {run.step} on {count} '
    f'images (split: {split}), {times} times each'
  )
  bound = bound_of(config, run.engine, run.params, source, count, run.seed)
  result = {
    **summary(bound, T),
    'step': run.step,
    'weights': run.weights,
    'data': reference.data_name(config),
    'split': split,
    'images': count,
    'times_an_image': bound.t.shape[1],
    'exact_in_t': draws == 0,
    'variance': config.sampler.variance,
    'seed': run.seed,
  }
  if not processes.is_primary():
    return
  record.write_bound(args.workdir, result)
  by_t = result['L_t_by_t']
  plots.save_curve(
    args.workdir / 'evaluation.png',
    np.array(by_t['t']),
    np.array(by_t['bits_per_dim']),
    't',
    'L_(t-1), bits/dim',
  )
  print(table(result))
  logs.say(f'all results          {args.workdir}/evaluation.json')
  logs.say(f'its terms by t       {args.workdir}/evaluation.png')


def bound_of(
  config: ConfigDict,
  engine: engines.Engine,
  params: Any,
  source: Any,
  count: int,
  seed: int,
) -> likelihood.Bound:
  """The bound of the first `count` images, with a progress bar."""
  compiled = engine.compile_map(
    sampling.bound(config, seed), params, name='the bound'
  )
  parts = []
  with logs.Progress('evaluating', count) as bar:
    for batch, real in rows(config, engine, source, count):
      part = compiled(params, batch)
      parts.append(jax.tree.map(lambda x, n=real: x[:n], part))
      check_finite(parts[-1], sum(len(p.prior) for p in parts[:-1]))
      bar.update(real)
  return drawing.gather(iter(parts))


def check_finite(bound: likelihood.Bound, start: int) -> None:
  """Refuses terms that are not finite; `start` is the first image's index.

  Raises:
    RunError: Naming the first such image, and t.
  """
  finite = np.isfinite(bound.terms) & np.isfinite(bound.prior)[:, None]
  if not np.all(finite):
    i, n = np.argwhere(~finite)[0]
    raise errors.RunError(
      f'the bound of image {start + i} is {bound.terms[i, n]} at t = '
      f'{bound.t[i, n]}; nothing is written. Try --config.model.dtype=float32, '
      'another --config.sampler.variance, or an earlier checkpoint (--step)'
    )


def rows(
  config: ConfigDict, engine: engines.Engine, source: Any, count: int
) -> Iterator[tuple[Any, int]]:
  """The first `count` images in batches of one size, and how many are real.

  The last batch is padded, so that one program does for all.
  """
  n = engine.mesh.size
  size = math.ceil(min(count, config.evaluate.batch_size) / n) * n
  for start in range(0, count, size):
    index = np.arange(start, start + size, dtype=np.int32)
    batch = source.gather(np.minimum(index, count - 1)) | {'index': index}
    real = min(size, count - start)
    yield engine.put_whole(batch), real


def summary(bound: likelihood.Bound, T: int) -> dict[str, Any]:
  """Bits per dimension and their parts, as means over images."""
  bits = [part * likelihood.BITS for part in likelihood.totals(bound, T)]
  total = bits[0] + bits[1] + bits[2]
  names = ('L_T', 'L_1_to_T-1', 'L_0')
  at_1 = np.asarray(bound.mse, np.float64)[:, 0]
  times, where = np.unique(bound.t, return_inverse=True)
  counts = np.bincount(where.ravel())
  by_t = np.bincount(where.ravel(), np.ravel(bound.terms)) / counts
  return {
    'bits_per_dim': float(np.mean(total)),
    'standard_error': float(np.std(total) / math.sqrt(len(total))),
    **{name: float(np.mean(x)) for name, x in zip(names, bits, strict=True)},
    'rate': float(np.mean(bits[0] + bits[1])),
    'distortion': float(np.mean(bits[2])),
    # Of x̂_0 at t = 1, in gray levels 0..255.
    'rmse': float(127.5 * math.sqrt(np.mean(at_1))),
    'L_t_by_t': {
      't': times.tolist(),
      'bits_per_dim': (by_t * likelihood.BITS).tolist(),
    },
  }


def table(result: dict[str, Any]) -> str:
  """Formats the results as text."""
  error = result['standard_error']
  how = 'exact in t' if result['exact_in_t'] else 'Monte Carlo over t, unbiased'
  return '\n'.join(
    [
      f'bits/dim             {result["bits_per_dim"]:.4f} ± {error:.4f}  (a '
      'bound from above)',
      f'  L_T                {result["L_T"]:.6f}',
      f'  L_1 + ... + L_T-1  {result["L_1_to_T-1"]:.4f}',
      f'  L_0                {result["L_0"]:.4f}',
      f'rate, distortion     {result["rate"]:.4f}, {result["distortion"]:.4f}',
      f'RMSE at t = 1        {result["rmse"]:.3f} of 255',
      f'{result["images"]} images (split: {result["split"]}), '
      f'{result["times_an_image"]} times each ({how})',
    ]
  )
