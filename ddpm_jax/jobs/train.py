"""`--mode=train`: trains, or goes on training, and draws pictures."""

import argparse
import contextlib
import datetime
import functools
import logging
import math
import pathlib
import shlex
from collections.abc import Callable
from collections.abc import Collection
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import errors
from ddpm_jax import expand
from ddpm_jax import flags as command
from ddpm_jax import plots
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax import sampling
from ddpm_jax import validate
from ddpm_jax.data import pipeline
from ddpm_jax.data import store
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import training
from ddpm_jax.metrics import distances
from ddpm_jax.parallel import engines
from ddpm_jax.parallel import processes
from ddpm_jax.parallel import stop
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage import fingerprint
from ddpm_jax.storage import images
from ddpm_jax.storage import lock
from ddpm_jax.storage import logs
from ddpm_jax.storage import workdir

# Of a weight. Those of a network that learns are below 100; products of some
# like this leave the range of float32 within a few layers.
LARGEST = 1e6
POINTS = 2000  # of the data, and drawn, in pictures of points

JOB = command.Job('trains, or goes on training', run=False, processes=True)


def flags(p: Any) -> None:
  """Adds the flags of this mode."""
  command.num_samples(p, 'images in the pictures (default: 64)')
  p.add_argument(
    '--allow',
    action='append',
    choices=['optimizer', 'data'],
    help='what may differ from what the run was begun with: the keys of '
    'config.optimizer, or the data; kept in changes.json; may be repeated',
  )
  p.set_defaults(num_samples=64, allow=[])


def run(config: ConfigDict, args: argparse.Namespace) -> None:
  """Trains up to `config.steps`, from the newest checkpoint if there is one.

  Raises:
    UserError: if recipe, devices, data or workdir do not do, or another
      program is writing into the workdir.
    Diverged: if loss or weights stop being numbers of use.
  """
  if jax.process_count() > 1 and not args.workdir:
    raise errors.UserError('several processes need one --workdir: name it')
  # What may be refused comes first, then what takes long.
  validate.wandb(config)
  mesh = build.mesh(config)
  build.train_step(recipe.provisional(config), engines.num_shards(mesh))
  new = not args.workdir
  folder = args.workdir or workdir.default(pathlib.Path(args.config).stem)
  workdir.check(folder)
  check_apart(config, folder)
  with lock.held(folder, new=new):
    state = train_in(config, args, folder, mesh)
  if args.stopped_code and int(state.step) < config.steps:
    raise SystemExit(args.stopped_code)


def check_apart(config: ConfigDict, folder: pathlib.Path) -> None:
  """Refuses a workdir whose pictures would become data.

  Raises:
    UserError: it is the folder of the data.
  """
  data = pathlib.Path(expand.expanded(config.data.path))
  if config.data.name == 'folder' and data.resolve() == folder.resolve():
    raise errors.UserError(
      f'--workdir={folder} is the folder of the data, and the pictures of the '
      'run would be taken for data: keep them apart'
    )


def train_in(
  config: ConfigDict,
  args: argparse.Namespace,
  folder: pathlib.Path,
  mesh: jax.sharding.Mesh,
) -> training.TrainState:
  """Trains in a workdir that is this program's alone."""
  source = dataset.source(config, folder=folder)
  config = dataset.settled(config, source)
  step_fn = build.train_step(config, engines.num_shards(mesh))
  pictures = picture_maker(config, mesh, folder, args.num_samples)
  condition = dataset.of_data(config, source, args.num_samples)
  pictures = functools.partial(pictures, condition=condition)
  batches = pipeline.batches(
    source,
    batch_size=config.batch_size,
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  begin(config, args, folder, source)
  several = jax.process_count() > 1
  many = f' of {jax.process_count()} processes' if several else ''
  logs.say(
    f'{len(source)} images, {mesh.size} device(s){many}, workdir {folder}'
  )
  if source.class_names:
    logs.say(f'classes: {dataset.listed(source.class_names)}')
  warn_of_signal(config)
  runs.warn_before_training(config, folder)

  with contextlib.ExitStack() as logged, contextlib.ExitStack() as stack:
    stop_asked = stack.enter_context(stop.requests())
    checkpoints = checkpoint.open(
      folder / 'checkpoints',
      keep=config.checkpoint.keep,
      keep_every=config.checkpoint.keep_every,
    )
    stack.callback(checkpoint.close, checkpoints)
    # All raise a RunError, and at the same step: what is under way is saved.
    stack.enter_context(processes.one_fails_all(errors.RunError))
    state = start(config, mesh, checkpoints, batches, args.allow)
    board = logged.enter_context(
      logs.boards(
        *(folder, int(state.step)),
        project=config.log.wandb,
        config=recipe.to_json(config),
      )
    )

    def save(state: training.TrainState, step: int) -> None:
      state = engines.to_global(state, mesh)
      check_weights(state, step)
      checkpoint.save(
        checkpoints,
        step,
        state=checkpoint.trained(state),
        ema=state.ema_params,
        data=batches.get_state(),
        config=recipe.to_json(config),
      )

    try:
      state = train(
        *(config, mesh, folder, step_fn, state),
        *(batches, save, pictures, board, stop_asked),
      )
    except errors.Diverged as e:
      checkpoint.wait(checkpoints)  # What is being saved counts.
      raise diverged(str(e), folder) from None
    stack.close()  # A signal ends the drawing, and asks for no checkpoint.
    finish(config, folder, state, pictures, board)
  return state


def begin(
  config: ConfigDict,
  args: argparse.Namespace,
  folder: pathlib.Path,
  source: store.Source,
) -> None:
  """Writes recipe, classes and hashes of the data into the workdir.

  It comes after all that may refuse the recipe.

  Raises:
    UserError: the data are not those that it was begun with.
  """
  # A run keeps its own devices, where it has moved to others.
  saved = recipe.to_json(config) | {'parallel': args.parallel}
  if processes.is_primary():
    known = checkpoint.steps(folder / 'checkpoints')
    changed: dict[str, Any] = {}
    if not workdir.has_checkpoint(folder):
      if recipe.is_another(config, folder):
        logs.say(
          f'{folder} has no checkpoint: it is begun again, with this recipe'
        )
    elif args.allow:
      begun = checkpoint.newest_config(folder / 'checkpoints')
      changed = recipe.changed(config, recipe.from_json(begun)) if begun else {}
    held = source.held()
    if known and (differ := dataset.changed_data(held, folder)):
      if 'data' not in args.allow:
        raise errors.UserError(
          f'the data are not those that {folder} was begun with ({differ}): '
          'give it those, or go on with these on purpose with --allow=data'
        )
      changed['data'] = differ
    if changed:
      now = datetime.datetime.now().isoformat(timespec='seconds')
      step = known[-1] if known else 0
      workdir.add_change(folder, {'step': step, 'time': now, **changed})
      names = ', '.join(changed)
      logs.say(f'changed from step {step} on, as changes.json says: {names}')
    if not (known or workdir.keeps_no_classes(folder)):
      workdir.write_classes(folder, source.class_names)
    workdir.write_data(folder, held)
    workdir.write_config(folder, saved)
  if jax.process_count() > 1:
    workdir.wait_for_config(folder, saved)


def warn_of_signal(config: ConfigDict) -> None:
  """Warns if x_T is not nearly the standard normal of the prior."""
  schedule = build.schedule(config)
  bits = likelihood.prior(schedule, jnp.ones((1, 1)))[0] * likelihood.BITS
  # The paper's is 3e-5 for x_0 = ±1.
  if bits > 1e-3:
    logging.warning(
      'x_T still holds something of x_0: log ᾱ_T = %.3g (the paper: -10.1), '
      'KL(q(x_T | x_0) ‖ N(0, I)) = %.2g bits/dim; samples may suffer; raise '
      'config.schedule.T or beta_T',
      schedule.log_alpha_bar[-1],
      bits,
    )


def check_weights(state: training.TrainState, step: int) -> None:
  """Refuses to save a state from which training cannot go on.

  The loss of a step cannot tell: it is that of the weights before the update.

  Raises:
    Diverged: naming an array.
  """
  weights = {'params': state.params, 'ema': state.ema_params}
  found = fingerprint.first_beyond(weights, LARGEST) or (
    fingerprint.first_beyond({'opt_state': state.opt_state})
  )
  if found:
    name, value = found
    raise errors.Diverged(f'after step {step} {name} has grown to {value:.3g}')


def diverged(what: str, folder: pathlib.Path) -> errors.Diverged:
  """The error for a run that must not be tried again as it is."""
  saved = checkpoint.steps(folder / 'checkpoints')
  if not saved:
    return errors.Diverged(
      f'{what}; no checkpoint was saved in {folder} yet. Try a lower '
      '--config.optimizer.learning_rate, or another --seed'
    )
  return errors.Diverged(
    f'{what}; the last checkpoint in {folder} is of step {saved[-1]}. To go on '
    'from it, add --allow=optimizer and a lower '
    '--config.optimizer.learning_rate'
  )


def start(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  checkpoints: Any,
  batches: grain.DatasetIterator,
  allow: Collection[str] = (),
) -> training.TrainState:
  """The state of the newest whole checkpoint, or else of step 0.

  `batches` is moved to where that checkpoint was.
  """
  init = functools.partial(build.init_state, config)
  abstract = engines.abstract_state(init, mesh)
  saved = checkpoint.restore(
    checkpoints, checkpoint.trained(abstract), abstract.ema_params
  )
  if saved is None:
    return engines.init_state(init, mesh)
  begun = recipe.from_json(saved.config)
  recipe.check_same(config, begun, f'checkpoint {saved.step}', allow)
  logs.say(f'going on from step {saved.step}')
  batches.set_state(saved.data)
  return abstract.replace(**saved.state, ema_params=saved.ema)


def train(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  folder: pathlib.Path,
  step_fn: Callable,
  state: training.TrainState,
  batches: grain.DatasetIterator,
  save: Callable[[training.TrainState, int], None],
  pictures: Callable[[Any, str], None],
  board: logs.Board,
  stop_asked: Callable[[int], bool],
) -> training.TrainState:
  """The loop: until `config.steps` or until a stop is asked for; it saves."""
  engine = config.parallel.engine
  train_step = logs.compiling(
    'the train step', engines.compile_step(step_fn, mesh, engine, state)
  )
  step = int(state.step)
  unread = None
  every = config.log.every
  # All at once and beforehand: in the loop it would wait for the device.
  first = step // every + 1
  written = np.arange(first, config.steps // every + 1) * every
  rates = np.asarray(jax.vmap(build.learning_rate(config))(written - 1))

  with (
    logs.metrics(folder, board, step, config.batch_size) as log,
    logs.Progress('training', config.steps, 'steps', initial=step) as bar,
  ):

    def read(step: int, metrics: dict[str, jax.Array]) -> None:
      values = {name: float(x) for name, x in jax.device_get(metrics).items()}
      if not all(math.isfinite(x) for x in values.values()):
        raise errors.Diverged(
          f'at step {step} the loss is {values["loss"]} and the gradient '
          f'{values["grad_norm"]}'
        )
      logs.advance(bar, values['loss'], config.batch_size)
      if step % every == 0:
        values['learning_rate'] = float(rates[step // every - first])
        log.write(step, values, bar.seconds)

    while step < config.steps and not stop_asked(step):
      batch = engines.put(next(batches), mesh, engine)
      state, metrics = train_step(state, batch)
      step += 1
      # Metrics are read a step late, so that the device never waits for us.
      if unread:
        read(*unread)
      unread = step, metrics

      if step % config.checkpoint.every == 0:
        read(*unread)
        unread = None
        log.sync()  # first: no checkpoint is ahead of the log
        save(state, step)
      drawn_every = config.log.pictures_every
      # The end draws its own.
      if drawn_every and step % drawn_every == 0 and step < config.steps:
        if unread:
          read(*unread)
          unread = None
        with bar.paused():
          pictures(runs.chosen(config, state), f'_{step}')
          board.pictures(step, drawn(folder, f'_{step}'))

    if unread:
      read(*unread)
    log.sync()
    save(state, step)
  return state


def drawn(folder: pathlib.Path, suffix: str) -> dict[str, pathlib.Path]:
  """The pictures that a run draws while it trains and at its end."""
  names = ('samples', 'progress')
  return {name: folder / f'{name}{suffix}.png' for name in names}


def picture_maker(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  folder: pathlib.Path,
  count: int,
) -> Callable[..., None]:
  """(weights, suffix, condition) -> samples.png, and progress.png: x̂_0 on the
  way, ten times; `condition` has a condition for each sample, or is None."""
  if not recipe.image_size(config):
    return point_pictures(config, mesh, folder)
  snapshots = min(10, config.sampler.steps)
  draw = runs.sampler(config, mesh, count, config.seed, snapshots)

  def pictures(params: Any, suffix: str, condition: Any = None) -> None:
    tiles, seen = runs.gather(draw(params, condition))
    if not processes.is_primary():
      return
    rows = seen[:8].reshape(-1, *tiles.shape[1:])
    images.save_png(folder / f'samples{suffix}.png', images.grid(tiles))
    images.save_png(
      folder / f'progress{suffix}.png', images.grid(rows, columns=snapshots)
    )

  return pictures


def point_pictures(
  config: ConfigDict, mesh: jax.sharding.Mesh, folder: pathlib.Path
) -> Callable[..., None]:
  """`picture_maker` for points: forward and reverse process at ten times.

  A two-sample test is printed: the energy distance of samples and data, and how
  often it would be as large between two halves of one set.
  """
  n = POINTS // mesh.size * mesh.size
  source, table = dataset.source(config), build.schedule(config)
  steps, times = picture_times(build.sampler(config).schedule)
  data = source.gather(np.arange(n))['image']
  engine = config.parallel.engine
  index = engines.put_whole(np.arange(n, dtype=np.int32), mesh, engine)
  eps = np.random.default_rng(config.seed).normal(size=data.shape)
  forward = [np.asarray(process.q_sample(table, data, t, eps)) for t in times]
  init = functools.partial(build.init_state, config)
  draw = engines.compile_map(
    sampling.chain(config, config.seed, steps),
    *(mesh, engine, jax.eval_shape(init).ema_params),
    name='the sampler',
  )

  def pictures(params: Any, suffix: str, condition: Any = None) -> None:
    del condition  # points take no condition
    chains = draw(params, index)
    runs.check_finite(chains.bad_t)
    reverse = list(chains.images.swapaxes(0, 1))
    if not processes.is_primary():
      return
    titles = [f't = {t}' for t in times]
    for ending in ('png', 'gif'):
      path = folder / f'progress{suffix}.{ending}'
      sets = {'q': forward, 'p': reverse}
      plots.save_scatter(path, sets, titles, forward)
    plots.save_scatter(
      folder / f'samples{suffix}.png',
      {'': [data, reverse[-1]]},
      ['data', 'samples'],
      [data],
    )
    rng = np.random.default_rng(config.seed)
    distance = distances.energy(data, reverse[-1])
    p_value = distances.energy_p_value(rng, data, reverse[-1], permutations=199)
    print(f'energy distance {distance:.5f}, p = {p_value:.3f}, n = {n}')

  return pictures


def picture_times(schedule: schedules.Schedule) -> tuple[list[int], list[int]]:
  """Up to ten steps of a sampler's schedule, from the last to 0, and their t.

  Closer together towards the end, where the shape appears.
  """
  T = schedule.T
  steps = sorted({round(T * (k / 9) ** 2) for k in range(10)}, reverse=True)
  return steps, np.asarray(schedule.time)[steps].tolist()


def finish(
  config: ConfigDict,
  folder: pathlib.Path,
  state: training.TrainState,
  pictures: Callable[[Any, str], None],
  board: logs.Board,
) -> None:
  """Draws the pictures of a finished run, and says where all is."""
  step, again = int(state.step), shlex.quote(str(folder))
  if step < config.steps:
    where = ', in each process' if jax.process_count() > 1 else ''
    logs.say(
      f'stopped, and saved, at step {step} of {config.steps}; to go on{where}:'
    )
    logs.say(f'  python -m ddpm_jax.main --workdir={again}')
    return
  logs.say(f'drawing samples, {config.sampler.steps} steps each')
  runs.warn_of_ema(config, folder, step)
  pictures(runs.chosen(config, state), '')
  if not processes.is_primary():
    return
  board.pictures(step, drawn(folder, ''))
  steps, losses = logs.curve(folder, 'loss')
  plots.save_curve(folder / 'loss.png', steps, losses, 'step', 'loss')
  logs.say(f'samples              {folder}/samples.png')
  logs.say(f'out of the noise     {folder}/progress.png')
  logs.say(f'loss                 {folder}/loss.png')
  logs.say('to draw more:')
  logs.say(
    '  python -m ddpm_jax.main --mode=sample --num_samples=100 '
    f'--workdir={again}'
  )
