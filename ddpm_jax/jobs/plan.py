"""`--mode=plan`: memory and time of a recipe on devices that are not here.

Builds the training step and the sampler as `train` and `sample` do, compiles
them ahead of time, and reports the numbers of the compiler. Nothing is run.
"""

import argparse
import json
import math
from typing import Any

import jax
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import machine
from ddpm_jax.planning import advice
from ddpm_jax.planning import measure
from ddpm_jax.planning import programs
from ddpm_jax.planning import table
from ddpm_jax.planning import topology as targets
from ddpm_jax.storage import logs

JOB = command.Job(
  'estimates memory and time on devices that are not here',
  run=False,
  devices='none',
)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.json(p)
  p.add_argument(
    '--topology',
    metavar='NAME',
    help='the devices, such as v5e:4x4, h100:1x8 or cpu:8',
  )
  p.add_argument(
    '--optimize',
    action='store_true',
    help='compile with all optimizations, which takes minutes longer',
  )


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Prints the plan for `--topology` as a table, or with `--json` as JSON.

  Raises:
    UserError: If the topology is not known, or does not fit the recipe.
  """
  if not args.topology:
    raise errors.UserError(
      'choose the devices, such as --topology=v5e:4x4, h100:1x8 or cpu:8'
    )
  if config.parallel.engine != 'jit':
    raise errors.UserError(
      'pmap compiles for devices that are here: plan with parallel.engine=jit'
    )
  try:
    target = targets.find(args.topology)
  except (RuntimeError, AssertionError):
    machine.look_for_devices()  # raises a UserError if JAX has no devices
    raise
  machine.look_for_devices()
  level: str = jax.config.jax_optimization_level  # type: ignore[attr-defined]
  if not args.optimize:
    jax.config.update('jax_optimization_level', 'O0')
  try:
    found = plan(config, target)
  finally:
    jax.config.update('jax_optimization_level', level)
  found = {
    'config': args.config or str(args.workdir),
    'topology': target.name,
    'optimized': bool(args.optimize),
  } | found
  print(json.dumps(found) if args.json else table.markdown(found))


def plan(config: ConfigDict, target: targets.Target) -> dict[str, Any]:
  """Returns the plan, per device: of the training step, and of `sampler`."""
  mesh = build.mesh(config, devices=target.devices)
  logs.say(f'compiling the training step for {mesh.size} device(s)')
  train = measure.program(programs.train(config, mesh), target)
  logs.say('compiling the sampler')
  draw = measure.program(programs.draw(config, mesh), target)
  step, call = train['roofline_seconds'], draw['roofline_seconds']
  calls = math.ceil(programs.IMAGES / draw['images'])
  return {
    'devices': mesh.size,
    'mesh': dict(mesh.shape),
    'memory_bytes': target.chip.memory,
    **train,
    'fits': both(train['fits'], draw['fits']),
    'train_fits': train['fits'],
    'steps': config.steps,
    'train_hours': step and config.steps * step / 3600,
    'advice': advice.of_training(config, target, mesh, train),
    'sampler': draw
    | {
      'hours': call and calls * call / 3600,
      'advice': advice.of_sampling(config, target, mesh, draw),
    },
  }


def both(a: bool | None, b: bool | None) -> bool | None:
  """Returns `a and b`; None if either is not known."""
  return None if None in (a, b) else a and b
