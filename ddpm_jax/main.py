"""The command line: `python -m ddpm_jax.main`."""

import argparse
import importlib
import logging
import pathlib
import pkgutil
import sys
from typing import NoReturn

from ddpm_jax import errors
from ddpm_jax import jobs

DESCRIPTION = """\
Denoising diffusion probabilistic models: train them, draw from them.

  python -m ddpm_jax.main --config=configs/digits.py
  python -m ddpm_jax.main --mode=sample --workdir=runs/NAME --num_samples=100
"""

EPILOG = """\
Any key of a recipe can be given too, such as --config.batch_size=64 or
--config.sampler.steps=100; configs/base.py explains them all. A run that was
stopped goes on when its --workdir is named again.
"""

# Flags that only some modes have.
OF_MODES = {
  'images': ('compress', 'figures'),
  'input': ('decompress',),
  'bytes': ('decompress',),
}


class Parser(argparse.ArgumentParser):
  """One line for a mistake, where argparse would print the usage as well."""

  def error(self, message: str) -> NoReturn:
    raise errors.UserError(f'{message} (--help lists the flags)')


def parser() -> Parser:
  """The flags. The modes are the files of jobs/."""
  modes = [job.name for job in pkgutil.iter_modules(jobs.__path__)]
  p = Parser(
    prog='python -m ddpm_jax.main',
    description=DESCRIPTION,
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  p.add_argument(
    '--config',
    metavar='FILE',
    help='the recipe, such as configs/digits.py or configs/lsun.py:church; '
    'by default the one that --workdir was begun with',
  )
  p.add_argument(
    '--mode', default='train', help=f'{" | ".join(modes)} (default: train)'
  )
  p.add_argument(
    '--workdir',
    type=pathlib.Path,
    help='the folder of the run (default: a new one under runs/)',
  )
  p.add_argument(
    '--num_samples',
    type=int,
    metavar='N',
    help='how many images to draw (default: 64; of figures each has its own)',
  )
  p.add_argument(
    '--seed', type=int, help='of everything random (default: the recipe says)'
  )
  p.add_argument(
    '--output',
    type=pathlib.Path,
    help='where images go: a folder (a PNG each), a .png (one grid) or an .npz '
    '(uint8 NHWC, `images`); default: a folder in --workdir',
  )
  p.add_argument(
    '--figure',
    metavar='NAME',
    help='which figure of the paper to draw, for --mode=figures; it lists them',
  )
  p.add_argument(
    '--images',
    type=pathlib.Path,
    metavar='PATH',
    help='for --mode=compress and --figure=codec: an image, a folder of them, '
    'or an .npz',
  )
  p.add_argument(
    '--input',
    metavar='FILE',
    help='for --mode=decompress: what --mode=compress has written',
  )
  p.add_argument(
    '--bytes',
    type=int,
    metavar='N',
    help='for --mode=decompress: of --input, take the first N',
  )
  return p


def split(argv: list[str]) -> tuple[list[str], dict[str, str]]:
  """Parts `--config.KEY=VALUE` or `--config.KEY VALUE` from the other flags."""
  flags, changes = [], {}
  rest = iter(argv)
  for word in rest:
    if not word.startswith('--config.'):
      flags.append(word)
      continue
    key, equals, value = word.removeprefix('--config.').partition('=')
    if not equals:
      value = next(rest, '')
    changes[key] = value
  return flags, changes


def run(argv: list[str]) -> None:
  flags, changes = split(argv)
  args, others = parser().parse_known_args(flags)
  if others:
    known = [f'--{name}' for name in vars(args)]
    raise errors.unknown('flag', others[0].partition('=')[0], known)
  modes = [job.name for job in pkgutil.iter_modules(jobs.__path__)]
  if args.mode not in modes:
    raise errors.unknown('mode', args.mode, modes)
  if args.num_samples is not None and args.num_samples < 1:
    raise errors.UserError(f'--num_samples={args.num_samples} is not positive')
  if args.mode != 'figures':
    args.num_samples = args.num_samples or 64
    if args.figure:
      raise errors.UserError('--figure is for --mode=figures')
  for name, those in OF_MODES.items():
    if args.mode not in those and getattr(args, name) is not None:
      raise errors.UserError(f'--{name} is for --mode={" or ".join(those)}')
  if args.mode == 'train' and args.seed is not None:
    changes['seed'] = str(args.seed)
  if args.mode == 'train' and args.output:
    raise errors.UserError('--output is for images: training has --workdir')
  # JAX and the rest take seconds to import; --help and mistakes need none.
  from ddpm_jax import recipe

  job = importlib.import_module(f'ddpm_jax.jobs.{args.mode}')
  config = None
  if getattr(job, 'needs_config', True):
    config = recipe.resolve(args.config, args.workdir, changes)
  job.run(config, args)


def main() -> NoReturn:
  logging.basicConfig(format='%(message)s', level=logging.WARNING)
  code = 0
  try:
    run(sys.argv[1:])
  except errors.UserError as e:
    print(f'error: {e}', file=sys.stderr)
    code = 2
  except errors.RunError as e:
    print(f'stopped: {e}', file=sys.stderr)
    code = 1
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    code = 1
  sys.stdout.flush()
  sys.stderr.flush()
  sys.exit(code)


if __name__ == '__main__':
  main()
