"""`--mode=figures --figure=NAME`: draws the figures of the paper, for any run.

The figures are the functions in `__all__` of `pictures`, `curves` and
`compression`. `--num_samples` is their argument `count`, and `--images` their
argument `path`, if they have one. All results in a figure are recomputed from
the weights.
"""

import argparse
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import plots
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax.storage import images
from ddpm_jax.storage import logs
from ddpm_jax.storage import outputs
from ddpm_jax.study import common
from ddpm_jax.study import compression
from ddpm_jax.study import curves
from ddpm_jax.study import pictures

JOB = command.Job('draws the figures of the paper', reads=('sampler.variance',))


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.num_samples(p, 'images in the figure (default: depends on --figure)')
  command.output(p, 'the .png to write (default: figure_NAME.png in --workdir)')
  p.add_argument(
    '--figure',
    metavar='NAME',
    help='the figure of the paper to draw; without it, lists their names',
  )
  p.add_argument(
    '--images',
    type=command.local_path,
    metavar='PATH',
    help='for --figure=codec: a folder, an .npz or an image to compress',
  )


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Writes `figure_NAME.png`, and a .gif if it is animated, into `--workdir`.

  Raises:
    UserError: If there is no such figure, no run in `--workdir`, or no images.
  """
  figure = named(args.figure)
  options: dict[str, Any] = (
    {} if args.num_samples is None else {'count': args.num_samples}
  )
  options |= {} if args.images is None else {'path': args.images}
  flags = {'count': '--num_samples', 'path': '--images'}
  for option in options.keys() - inspect.signature(figure).parameters:
    raise errors.UserError(f'--figure={args.figure} takes no {flags[option]}')
  path = args.output or args.workdir / f'figure_{args.figure}.png'
  if path.suffix.lower() != '.png':
    raise errors.UserError(f'--output={path} must end in .png')
  outputs.prepare(path)
  if not recipe.image_size(config):
    raise errors.UserError('figures need images, and this run is of points')
  run = runs.load(config, args.workdir, seed=args.seed)
  logs.say(
    f'figure {args.figure}: the {run.weights} weights of step {run.step}'
  )
  save(path, figure(run, **options))


def save(path: pathlib.Path, drawn: common.Drawn) -> None:
  parts = [] if drawn.plot is None else [drawn.plot]
  if drawn.tiles is not None:
    parts += [plots.labelled(drawn.tiles, drawn.titles, drawn.labels)]
  images.save_png(path, plots.stack(parts))
  logs.say(f'figure               {path}')
  if drawn.frames is not None:
    film = path.with_suffix('.gif')
    shown = zip(drawn.frames, drawn.heads, strict=True)
    frames = [plots.labelled(tiles, head=head) for tiles, head in shown]
    images.save_gif(film, frames, 80)
    logs.say(f'animated             {film}')


def every() -> dict[str, Callable[..., common.Drawn]]:
  """Returns {name: figure}, sorted by name."""
  modules = (pictures, curves, compression)
  known = {name: getattr(m, name) for m in modules for name in m.__all__}
  return dict(sorted(known.items()))


def named(name: str | None) -> Callable[..., common.Drawn]:
  known = every()
  if not name:
    raise errors.UserError(f'choose a --figure; known: {", ".join(known)}')
  if name not in known:
    raise errors.unknown('figure', name, known)
  return known[name]
