"""The command line: `python -m ddpm_jax.main`."""

import argparse
import importlib
import logging
import pathlib
import pkgutil
import sys
from collections.abc import Callable
from typing import Any
from typing import NoReturn

from ddpm_jax import errors
from ddpm_jax import expand
from ddpm_jax import jobs
from ddpm_jax import ranges
from ddpm_jax.runtime import machine
from ddpm_jax.runtime import paths
from ddpm_jax.runtime import streams

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


# The flags that not all modes have, and those that do.
ONLY = {
  'allow': ['train'],
  'bytes': ['decompress'],
  'compare': ['benchmark'],
  'figure': ['figures'],
  'image': ['edit'],
  'images': ['compress', 'evaluate', 'figures'],
  'inception': ['evaluate'],
  'input': ['convert', 'decompress'],
  'json': ['benchmark', 'plan'],
  'label': ['sample', 'edit'],
  'mask': ['edit'],
  'optimize': ['plan'],
  'profile': ['benchmark'],
  'prompt': ['sample', 'edit'],
  'prompts': ['sample', 'edit'],
  'reference': ['evaluate'],
  'step': ['evaluate'],
  'strength': ['edit'],
  'to': ['edit'],
  'topology': ['plan'],
}

# The flags that are paths.
PATHS = (
  *('compare', 'config', 'image', 'images', 'inception', 'input', 'mask'),
  *('output', 'profile', 'prompts', 'reference', 'to', 'workdir'),
)
# The modes that compute nothing, or for devices that are not here.
NO_DEVICES = ('compare', 'plan')
# The modes that work on a run, in --workdir. (evaluate: but for --images)
OF_A_RUN = (
  *('compress', 'decompress', 'edit', 'evaluate', 'few_steps', 'figures'),
  *('sample', 'score'),
)
# Those that write into it; the others do if no --output is named.
INTO_THE_RUN = ('evaluate', 'few_steps', 'score')
# Those that take one device, or devices that are not here.
OTHER_DEVICES = ('compress', 'decompress', 'plan')
# Those that read config.sampler.variance whatever the sampler: the bound does.
OF_THE_BOUND = ('evaluate', 'figures')


class Parser(argparse.ArgumentParser):
  """One line for a mistake, where argparse would print the usage as well."""

  def error(self, message: str) -> NoReturn:
    said = errors.short(message, 300)
    raise errors.UserError(f'{said} (--help lists the flags)')


def a_path(
  text: str, read: Callable[[str], pathlib.Path] = paths.path
) -> pathlib.Path:
  """The type of a flag: argparse names the flag in what is wrong with it."""
  try:
    return read(text)
  except errors.UserError as e:
    raise argparse.ArgumentTypeError(str(e)) from None


def a_local_path(text: str) -> pathlib.Path:
  return a_path(text, paths.local)


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
    type=a_path,
    help='the folder of the run, here or gs://BUCKET/NAME (default: a new one '
    'under runs/)',
  )
  p.add_argument(
    '--num_samples',
    type=int,
    metavar='N',
    help='how many images to draw (default: 64; of figures each has its own); '
    'for --mode=evaluate, how many to score: the papers take 50000',
  )
  p.add_argument(
    '--seed', type=int, help='of everything random (default: the recipe says)'
  )
  p.add_argument(
    '--allow',
    action='append',
    choices=['optimizer', 'data'],
    help='what may be another than the run was begun with: the keys of '
    'config.optimizer, or the data; kept in changes.json; may be repeated',
  )
  p.add_argument(
    '--prompt',
    action='append',
    metavar='TEXT',
    help='what the images shall be of, for a model of texts; may be repeated. '
    '--num_samples is then of each (default: 8)',
  )
  p.add_argument(
    '--prompts', type=a_local_path, metavar='FILE', help='the same, a line each'
  )
  p.add_argument(
    '--label',
    action='append',
    metavar='CLASS',
    help='the class, for a model of classes: a name of `classes.json` in '
    '--workdir, or else a number; may be repeated (default: all take turns)',
  )
  p.add_argument(
    '--guidance',
    metavar='W',
    help='how much of it: 1 as it is, more exaggerates; short for '
    '--config.sampler.guidance',
  )
  p.add_argument(
    '--output',
    type=a_path,
    help='where images go: a folder (a PNG each), a .png (one grid) or an .npz '
    '(uint8 NHWC, `images`); default: a folder in --workdir, named by the '
    'settings. Of convert: the new folder',
  )
  p.add_argument(
    '--input',
    metavar='MODEL',
    help='for --mode=convert: a folder of diffusers, its name on '
    'huggingface.co, or a .ckpt of pytorch_diffusion (with --config); for '
    '--mode=decompress: what --mode=compress has written',
  )
  p.add_argument(
    '--bytes',
    type=int,
    metavar='N',
    help='for --mode=decompress: of --input, take the first N',
  )
  p.add_argument(
    '--figure',
    metavar='NAME',
    help='which figure of the paper to draw, for --mode=figures; it lists them',
  )
  p.add_argument(
    '--image',
    type=a_local_path,
    metavar='FILE',
    help='for --mode=edit: the image to make others of',
  )
  p.add_argument(
    '--mask',
    type=a_local_path,
    metavar='FILE',
    help='for --mode=edit: white where --image is made anew, black where it is '
    'kept; of its size',
  )
  p.add_argument(
    '--to',
    type=a_local_path,
    metavar='FILE',
    help='for --mode=edit: the image that --image turns into',
  )
  p.add_argument(
    '--strength',
    type=float,
    metavar='S',
    help='for --mode=edit without --mask: how noisy --image is made first, of '
    'T; from 0 (it is kept) to 1 (it is forgotten); default: 0.5',
  )
  p.add_argument(
    '--topology',
    metavar='NAME',
    help='for --mode=plan: the devices, such as v5e:4x4, h100:1x8 or cpu:8',
  )
  p.add_argument(
    '--optimize',
    action='store_true',
    default=None,
    help='for --mode=plan: compile as a run does, which takes minutes more',
  )
  p.add_argument(
    '--json',
    action='store_true',
    default=None,
    help='for --mode=plan and --mode=benchmark: one JSON object on stdout',
  )
  p.add_argument(
    '--compare',
    type=a_local_path,
    metavar='FILE',
    help='for --mode=benchmark: what an earlier one with --json has printed; '
    'ratios to it are printed',
  )
  p.add_argument(
    '--profile',
    type=a_local_path,
    metavar='FOLDER',
    help='for --mode=benchmark: trace a few train steps into this folder, for '
    'TensorBoard or Perfetto, and print the ten costliest kinds of operation',
  )
  scores = p.add_argument_group('for --mode=evaluate')
  scores.add_argument(
    '--inception',
    type=a_local_path,
    metavar='FILE',
    help='the weights of Inception-v3, .safetensors or .pth: FID and the like '
    'need them',
  )
  scores.add_argument(
    '--reference',
    type=a_local_path,
    metavar='FILE.npz',
    help='statistics to compare with, `mu` and `sigma`; default: of the data '
    'set, computed once',
  )
  scores.add_argument(
    '--images',
    type=a_local_path,
    metavar='PATH',
    help='score these, a folder or an .npz, in the place of samples; for '
    '--mode=compress and --figure=codec: what to send, an image too',
  )
  scores.add_argument(
    '--step',
    type=int,
    metavar='N',
    help='of the checkpoint to evaluate (default: the newest)',
  )
  many = p.add_argument_group(
    'for several processes',
    'TPU pods, Slurm, MPI and Kubernetes tell JAX of the others. Elsewhere, '
    'name them:',
  )
  many.add_argument(
    '--coordinator',
    metavar='HOST:PORT',
    help='of process 0, any free port of it; the same for all of them',
  )
  many.add_argument(
    '--num_processes',
    type=int,
    metavar='N',
    help='how many there are; 1: alone, whatever the machine is part of',
  )
  many.add_argument(
    '--process_id', type=int, metavar='I', help='which one this is: 0 to N - 1'
  )
  many.add_argument(
    '--start_timeout',
    type=int,
    default=300,
    metavar='SECONDS',
    help='until all have come (default: 300)',
  )
  many.add_argument(
    '--peer_timeout',
    type=int,
    default=100,
    metavar='SECONDS',
    help='without a sign of life from one, until all stop (default: 100); one '
    'that was killed is noticed at once',
  )
  many.add_argument(
    '--stopped_code',
    type=int,
    default=0,
    metavar='CODE',
    help='how to exit where training was stopped before its end (default: 0), '
    'so that a script knows to start it again',
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
    flag = others[0].partition('=')[0]
    raise errors.unknown('flag', flag, known, others='--help lists them all')
  modes = [job.name for job in pkgutil.iter_modules(jobs.__path__)]
  if args.mode not in modes:
    raise errors.unknown('mode', args.mode, modes)
  ranges.check_flags(vars(args))
  expand_paths(args)
  for name, only in ONLY.items():
    if getattr(args, name) is not None and args.mode not in only:
      raise errors.UserError(f'--{name} is for --mode={" or ".join(only)}')
  for named in (args.workdir, args.output):
    paths.check(named)
  asked = args.prompt or args.prompts or args.label
  if args.guidance is not None:
    changes['sampler.guidance'] = args.guidance
  if args.mode not in ('evaluate', 'figures'):
    args.num_samples = args.num_samples or (8 if asked else 64)
  if args.mode == 'train' and args.seed is not None:
    changes['seed'] = str(args.seed)
  if args.mode == 'train' and args.output:
    raise errors.UserError('--output is for images: training has --workdir')
  # JAX and the rest take seconds to import; --help and mistakes need none.
  machine.start_jax()
  from ddpm_jax.runtime import processes
  from ddpm_jax.runtime import stop
  from ddpm_jax.runtime import workdir

  if args.mode in OF_A_RUN and not (args.mode == 'evaluate' and args.images):
    workdir.check_run(args.workdir)
    if args.mode in INTO_THE_RUN or not args.output:
      check_writable(args)
  machine.keep_compiled()
  args.changes, args.allow = changes, args.allow or []
  job = importlib.import_module(f'ddpm_jax.jobs.{args.mode}')
  with processes.together(
    *(args.coordinator, args.num_processes, args.process_id),
    start_timeout=args.start_timeout,
    peer_timeout=args.peer_timeout,
    can_stop=args.mode == 'train',
  ):
    if args.mode not in NO_DEVICES:
      machine.look_for_devices()
    if not getattr(job, 'many_processes', False):
      processes.only_one(f'--mode={args.mode}')
    needs_config = getattr(job, 'needs_config', True)
    config = config_of(args) if needs_config else None
    with stop.second_quits():
      job.run(config, args)


def check_writable(args: argparse.Namespace) -> None:
  """Refuses a --workdir that cannot be written, before there is any work."""
  from ddpm_jax.runtime import workdir

  try:
    workdir.check(args.workdir)
  except errors.UserError as e:
    elsewhere = 'copy the run, and name its copy'
    if args.mode not in INTO_THE_RUN:
      elsewhere = 'name another place with --output'
    raise errors.UserError(f'{e}: {elsewhere}') from None


def expand_paths(args: argparse.Namespace) -> None:
  """Replaces ~ and $HOME in the flags that are paths.

  Raises:
    UserError: naming the flag, if there is no such home or variable.
  """
  for name in PATHS:
    path = getattr(args, name)
    if path and not paths.is_remote(path):
      try:
        setattr(args, name, type(path)(expand.expanded(str(path))))
      except errors.UserError as e:
        raise errors.UserError(f'--{name}={e}') from None


def config_of(args: argparse.Namespace) -> Any:
  """The recipe, refused if it holds what nothing would read.

  On a run that was begun on other devices it is fitted to those here; what the
  run says of them stays in `args.parallel`.
  """
  from ddpm_jax import recipe
  from ddpm_jax import validate

  config = recipe.resolve(
    *(args.config, args.workdir, args.changes),
    allow=args.allow,
    recover=args.mode == 'train',
  )
  said = set(recipe.flatten(config) if args.config else args.changes)
  if args.mode in OF_THE_BOUND:
    said -= {'sampler.variance'}
  validate.unread(config, said, args.changes)
  args.parallel = recipe.to_json(config)['parallel']
  says_devices = any(key.startswith('parallel.') for key in args.changes)
  if not (args.config or says_devices or args.mode in OTHER_DEVICES):
    trains = args.mode in ('train', 'benchmark')
    config = validate.fit_devices(config, trains=trains)
  validate.check(config)
  return config


def main() -> NoReturn:
  streams.secure()
  logging.basicConfig(format='%(message)s', level=logging.WARNING)
  code = 0
  try:
    machine.keep_memory()
    machine.open_many_files()
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
