"""The command line: the flags of all modes, and those of each mode.

A mode is a file in jobs/ with a `JOB` and a function `flags`, which adds the
mode's flags to a parser.
"""

import argparse
import importlib
import pathlib
import pkgutil
from collections.abc import Callable
from typing import Any
from typing import NamedTuple
from typing import NoReturn
from typing import TypeVar

import ddpm_jax
from ddpm_jax import errors
from ddpm_jax import expand
from ddpm_jax import machine
from ddpm_jax import ranges
from ddpm_jax.storage import paths

T = TypeVar('T')
JOBS = pathlib.Path(__file__).parent / 'jobs'
DESCRIPTION = """\
Denoising diffusion probabilistic models: train them, sample from them.

  python -m ddpm_jax.main --config=configs/digits.py
  python -m ddpm_jax.main --mode=sample --workdir=runs/NAME --num_samples=100
"""

EPILOG = """\
--mode=MODE --help lists the flags of a mode. Any key of a recipe can be given
too, such as --config.batch_size=64 or --config.sampler.steps=100;
configs/base.py explains them all. To resume a run, give its --workdir again.
"""


class Job(NamedTuple):
  """What `main` prepares for a mode.

  Attributes:
    help: One line for --help.
    run: Whether the mode needs the run in --workdir.
    unless: A flag with which it does not.
    writes: Whether it writes into the run even if --output is set.
    recipe: Whether `main` reads the recipe for it.
    devices: 'here', the devices of the recipe; 'one'; or 'none', which includes
      devices that are not here.
    processes: Whether several processes can run it together.
    reads: Keys that it always reads, whatever functions the recipe names.
  """

  help: str
  run: bool = True
  unless: str = ''
  writes: bool = False
  recipe: bool = True
  devices: str = 'here'
  processes: bool = False
  reads: tuple[str, ...] = ()


class Parser(argparse.ArgumentParser):
  """Raises an error with one line, where argparse also prints the usage."""

  def error(self, message: str) -> NoReturn:
    said = errors.short(message, 300)
    raise errors.UserError(f'{said} (--help lists the flags)')


def path(text: str) -> pathlib.Path:
  """The type of a flag for a file or folder, local or gs://."""
  return _path(text, paths.path)


def local_path(text: str) -> pathlib.Path:
  """The type of a flag for a local file or folder."""
  return _path(text, paths.local)


def _path(text: str, read: Callable[[str], pathlib.Path]) -> pathlib.Path:
  def expanded(text: str) -> pathlib.Path:
    return read(text if paths.is_remote(text) else expand.expanded(text))

  return typed(expanded)(text)


def name_or_path(text: str) -> str:
  """The type of a flag for a path, or a name on huggingface.co."""
  return typed(expand.expanded)(text)


def typed(read: Callable[[str], T]) -> Callable[[str], T]:
  """The type of a flag that `read` parses, which may raise a UserError."""

  def parse(text: str) -> T:
    try:
      return read(text)
    except errors.UserError as e:  # argparse names the flag
      raise argparse.ArgumentTypeError(str(e)) from None

  return parse


def modes() -> list[str]:
  """The names of the modes."""
  return [job.name for job in pkgutil.iter_modules([str(JOBS)])]


def load(mode: str) -> Any:
  """Imports the module of a mode, which takes seconds.

  Raises:
    UserError: If there is no such mode.
  """
  if mode not in modes():
    raise errors.unknown('mode', mode, modes())
  machine.start_jax()
  return importlib.import_module(f'ddpm_jax.jobs.{mode}')


def parser(mode: str | None = None) -> Parser:
  """The parser of a mode; without one, of the flags that all modes have."""
  description = DESCRIPTION
  if mode:
    job = load(mode)
    description = f'--mode={mode}: {job.JOB.help}.'
  p = Parser(
    prog='python -m ddpm_jax.main',
    description=description,
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  _common(p)
  if mode:
    job.flags(p.add_argument_group(f'for --mode={mode}'))
  _processes(p)
  return p


def _common(p: Parser) -> None:
  p.add_argument(
    '--version',
    action='version',
    version=f'ddpm_jax {ddpm_jax.__version__}',
    help='print the version, and exit',
  )
  p.add_argument(
    '--config',
    metavar='FILE',
    help='the recipe, such as configs/digits.py or configs/lsun.py:church; '
    'by default that of the run in --workdir',
  )
  p.add_argument(
    '--mode', default='train', help=f'{" | ".join(modes())} (default: train)'
  )
  p.add_argument(
    '--workdir',
    type=path,
    help='the folder of the run, here or gs://BUCKET/NAME (default: a new one '
    'under runs/)',
  )
  p.add_argument(
    '--seed', type=int, help='the random seed (default: config.seed)'
  )
  p.add_argument(
    '--guidance',
    metavar='W',
    help='scale of classifier-free guidance; 1: none; short for '
    '--config.sampler.guidance',
  )


def _processes(p: Parser) -> None:
  many = p.add_argument_group(
    'for several processes',
    'On TPU pods, Slurm, MPI and Kubernetes, JAX finds the processes. '
    'Elsewhere, set:',
  )
  many.add_argument(
    '--coordinator',
    metavar='HOST:PORT',
    help='the address of process 0, with a free port; the same for all',
  )
  many.add_argument(
    '--num_processes',
    type=int,
    metavar='N',
    help='the number of processes; 1: run alone, even on a cluster',
  )
  many.add_argument(
    '--process_id',
    type=int,
    metavar='I',
    help='the index of this process: 0 to N - 1',
  )
  many.add_argument(
    '--start_timeout',
    type=int,
    default=300,
    metavar='SECONDS',
    help='how long to wait for all processes to start (default: 300)',
  )
  many.add_argument(
    '--peer_timeout',
    type=int,
    default=100,
    metavar='SECONDS',
    help='stop all processes when one sends no heartbeat for this long '
    '(default: 100); a process that is killed is noticed at once',
  )
  many.add_argument(
    '--stopped_code',
    type=int,
    default=0,
    metavar='CODE',
    help='the exit code if training was stopped before its end (default: 0), '
    'so that a script can start it again',
  )


def num_samples(p: Any, help: str = 'images to draw (default: 64)') -> None:
  """Adds --num_samples."""
  p.add_argument('--num_samples', type=int, metavar='N', help=help)


def output(p: Any, help: str) -> None:
  """Adds --output."""
  p.add_argument('--output', type=path, help=help)


def json(p: Any) -> None:
  """Adds --json."""
  p.add_argument(
    '--json', action='store_true', help='print one JSON object on stdout'
  )


def split(argv: list[str]) -> tuple[list[str], dict[str, str]]:
  """Separates `--config.KEY=VALUE` (or ` VALUE`) from the other flags."""
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


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses a command line; `changes` has the keys of the recipe.

  Raises:
    UserError: For an unknown mode or flag, or a value that is not valid.
  """
  words, changes = split(argv)
  mode = _mode(words)
  args, others = parser(mode).parse_known_args(words)
  if others:
    raise _unknown(others[0].partition('=')[0], mode, args)
  ranges.check_flags(vars(args))
  if args.guidance is not None:
    changes['sampler.guidance'] = args.guidance
  args.changes = changes
  return args


def check_places(args: argparse.Namespace, job: Job) -> None:
  """Checks --workdir and --output before anything is computed.

  Raises:
    UserError: If a place cannot be read or written, or there is no run where
      the mode needs one.
  """
  from ddpm_jax.storage import workdir

  output = getattr(args, 'output', None)
  for named in (args.workdir, output):
    paths.check(named)
  if job.run and not (job.unless and getattr(args, job.unless)):
    workdir.check_run(args.workdir)
    if job.writes or not output:
      elsewhere = 'copy the run, and use the copy'
      if not job.writes:
        elsewhere = 'set --output to another place'
      workdir.check_writable(args.workdir, elsewhere)


def _mode(words: list[str]) -> str | None:
  """The mode that is named; None for help on all modes, and the version."""
  p = Parser(add_help=False, allow_abbrev=False)
  p.add_argument('--mode')
  p.add_argument('--help', '-h', '--version', action='store_true')
  known, _ = p.parse_known_args(words)
  return known.mode or (None if known.help else 'train')


def _unknown(
  flag: str, mode: str | None, args: argparse.Namespace
) -> errors.UserError:
  """The error for a flag that the mode does not have."""
  known = [f'--{name}' for name in vars(args)]
  theirs = [m for m in modes() if flag in _flags(m)]
  if theirs:
    return errors.UserError(f'{flag} is for --mode={" or ".join(theirs)}')
  every = known + [name for m in modes() for name in _flags(m)]
  return errors.unknown(
    'flag', flag, set(every), others=f'--mode={mode} --help lists them all'
  )


def _flags(mode: str) -> list[str]:
  p = Parser(add_help=False)
  load(mode).flags(p)
  return [action.option_strings[0] for action in p._actions]
