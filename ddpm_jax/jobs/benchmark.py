"""`--mode=benchmark`: measures what a recipe costs on this machine."""

import argparse
import contextlib
import json
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import flags as command
from ddpm_jax import recipe
from ddpm_jax.parallel import meshes
from ddpm_jax.parallel import processes
from ddpm_jax.planning import bench
from ddpm_jax.planning import profile
from ddpm_jax.planning import timing
from ddpm_jax.storage import logs
from ddpm_jax.storage import workdir

JOB = command.Job(
  'measures what a recipe costs on this machine', run=False, processes=True
)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.json(p)
  p.add_argument(
    '--compare',
    type=command.local_path,
    metavar='FILE',
    help='the output of an earlier run with --json; ratios to it are printed',
  )
  p.add_argument(
    '--profile',
    type=command.local_path,
    metavar='FOLDER',
    help='trace a few train steps into this folder, for TensorBoard or '
    'Perfetto, and print the ten costliest kinds of operation',
  )


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Prints a table, or with `--json` one JSON object.

  Raises:
    UserError: If recipe, devices, `--compare` or `--profile` are not valid.
  """
  earlier = bench.read(args.compare) if args.compare else {}
  if args.profile:
    workdir.create(args.profile)
  engine = build.engine(config)
  mesh = engine.mesh
  # Refuses a batch that the devices cannot share.
  build.train_step(recipe.provisional(config), meshes.num_shards(mesh))
  source = bench.data(config)
  config = dataset.settled(config, source)
  with scratch(args.workdir) as folder:
    made = bench.Bench(config, engine, source, folder)
    results = dict(made.everything())
    if args.profile:
      top = profile.costliest(made.one_step, args.profile, made.compiled)
  device = mesh.devices.flat[0]
  about = {
    'recipe': args.config or str(args.workdir),
    'changes': args.changes,
    'processes': jax.process_count(),
    'devices': mesh.size,
    'device': device.device_kind,
    'engine': config.parallel.engine,
    'batch_size': config.batch_size,
    'parameters': made.parameters,
    'jax': jax.__version__,
  }
  if args.json:
    print(json.dumps({**about, 'results': results}))
  else:
    print(bench.table(about, results, earlier))
  if args.profile:
    logs.say(profile.table(top))
    logs.say(f'the trace, for TensorBoard or ui.perfetto.dev: {args.profile}')


@contextlib.contextmanager
def scratch(folder: pathlib.Path | None) -> Iterator[pathlib.Path]:
  """A temporary folder, in `folder` if named; the same for all processes."""
  root = folder or pathlib.Path(tempfile.gettempdir())
  number = timing.agreed(secrets.randbelow(2**31))
  made = root / f'ddpm_jax_benchmark_{number}'
  workdir.create(made)
  try:
    yield made
  finally:
    if processes.is_primary():
      shutil.rmtree(made, ignore_errors=True)
