"""The command line: `python -m ddpm_jax.main`, or `ddpm-jax`."""

import argparse
import logging
import sys
from typing import Any
from typing import NoReturn

from ddpm_jax import errors
from ddpm_jax import flags
from ddpm_jax import machine
from ddpm_jax import streams


def run(argv: list[str]) -> None:
  """Runs the mode of a command line."""
  args = flags.parse(argv)
  from ddpm_jax.parallel import processes
  from ddpm_jax.parallel import stop

  module = flags.load(args.mode)
  job: flags.Job = module.JOB
  flags.check_places(args, job)
  machine.keep_compiled()
  with processes.together(
    *(args.coordinator, args.num_processes, args.process_id),
    start_timeout=args.start_timeout,
    peer_timeout=args.peer_timeout,
    can_stop=args.mode == 'train',
  ):
    if job.devices != 'none':
      machine.look_for_devices()
    if not job.processes:
      processes.only_one(f'--mode={args.mode}')
    config = config_of(args, job) if job.recipe else None
    with stop.second_quits():
      module.run(config, args)


def config_of(args: argparse.Namespace, job: flags.Job) -> Any:
  """Resolves and checks the recipe.

  The recipe of a run that was started on other devices is fitted to those here;
  its own `parallel` section stays in `args.parallel`.
  """
  from ddpm_jax import recipe
  from ddpm_jax import validate

  trains = args.mode in ('train', 'benchmark')
  if args.mode == 'train' and args.seed is not None:
    args.changes['seed'] = str(args.seed)
  config = recipe.resolve(
    *(args.config, args.workdir, args.changes),
    allow=getattr(args, 'allow', None) or [],
    recover=args.mode == 'train',
  )
  said = set(recipe.flatten(config) if args.config else args.changes)
  validate.unread(config, said - set(job.reads), args.changes)
  args.parallel = recipe.to_json(config)['parallel']
  says_devices = any(key.startswith('parallel.') for key in args.changes)
  if not (args.config or says_devices or job.devices != 'here'):
    config = validate.fit_devices(config, trains=trains)
  validate.check(config)
  return config


def search_working_directory() -> None:
  """Puts the working directory on sys.path, where `python -m` has it."""
  if not sys.flags.safe_path and '' not in sys.path:
    sys.path.insert(0, '')


def main() -> NoReturn:
  streams.secure()
  logging.basicConfig(format='%(message)s', level=logging.WARNING)
  code = 0
  try:
    machine.open_many_files()
    search_working_directory()
    try:
      run(sys.argv[1:])
    except SystemExit as e:  # of --help, or with --stopped_code
      if e.code:
        raise
    streams.check()
  except BaseException as e:
    if not errors.expected(e):
      raise
    code, line = errors.verdict(e)
    print(line, file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  sys.exit(code)


if __name__ == '__main__':
  main()
