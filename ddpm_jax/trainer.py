"""Training: from a recipe and data to a run in a workdir.

`loop` is the training loop; `training.train_step` is one step of it.
"""

import contextlib
import dataclasses
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
from ddpm_jax import plots
from ddpm_jax import previews
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax import validate
from ddpm_jax.data import pipeline
from ddpm_jax.data import store
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import training
from ddpm_jax.parallel import engines
from ddpm_jax.parallel import meshes
from ddpm_jax.parallel import processes
from ddpm_jax.parallel import stop
from ddpm_jax.storage import boards
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage import fingerprint
from ddpm_jax.storage import lock
from ddpm_jax.storage import logs
from ddpm_jax.storage import metrics_log
from ddpm_jax.storage import workdir

# The largest weight that is saved. Those of a network that learns are below
# 100; products of a few as large as this exceed float32 within a few layers.
LARGEST = 1e6


def train(
  config: ConfigDict,
  folder: pathlib.Path | None,
  *,
  name: str = 'run',
  source: store.Source | None = None,
  allow: Collection[str] = (),
  num_samples: int = 64,
  parallel: dict[str, Any] | None = None,
  from_python: bool = False,
) -> runs.Run:
  """Trains in a workdir to `config.steps`, from its newest checkpoint if any.

  Args:
    config: The recipe, checked by `validate.check`.
    folder: The workdir; None for a new one under runs/.
    name: The first word of the name of a new workdir.
    source: The data; by default those of the recipe.
    allow: What may differ from the run in the workdir: 'optimizer', 'data'.
    num_samples: Number of samples in the previews.
    parallel: The `parallel` section to save, if the run was started on other
      devices than those of `config`.
    from_python: Whether a Python program calls, which no signal may end; see
      `stop.interrupts`.

  Returns:
    The run. It ends before `config.steps` if a signal stopped it.

  Raises:
    UserError: If devices, data or workdir are not valid, or another program is
      writing into the workdir.
    Diverged: If the loss or the weights are not finite, or too large.
  """
  # What may be refused comes before what takes time.
  validate.wandb(config)
  engine = build.engine(config)
  build.train_step(recipe.provisional(config), meshes.num_shards(engine.mesh))
  new = folder is None
  folder = workdir.default(name) if folder is None else folder
  workdir.check(folder)
  check_apart(config, folder)
  with lock.held(folder, new=new):
    source = source or dataset.source(config, folder=folder)
    config = dataset.settled(config, source)
    saved = recipe.to_json(config)
    if parallel:
      saved['parallel'] = parallel
    state = _train_locked(
      *(config, engine, folder, source, allow, num_samples, saved),
      stops=stop.interrupts if from_python else stop.requests,
    )
  weights = 'raw' if config.sampler.weights == 'raw' else 'EMA'
  return runs.Run(
    *(folder, config, engine, weights, int(state.step)),
    *(runs.chosen(config, state), config.seed),
  )


def check_apart(config: ConfigDict, folder: pathlib.Path) -> None:
  """Refuses a workdir whose images would become data.

  Raises:
    UserError: If it is the folder of the data.
  """
  data = pathlib.Path(expand.expanded(config.data.path))
  if config.data.name == 'folder' and data.resolve() == folder.resolve():
    raise errors.UserError(
      f'--workdir={folder} is the folder of the data, and the images of the '
      'run would be taken for data: keep them apart'
    )


def _train_locked(
  config: ConfigDict,
  engine: engines.Engine,
  folder: pathlib.Path,
  source: store.Source,
  allow: Collection[str],
  num_samples: int,
  saved: dict[str, Any],
  stops: Callable[[], contextlib.AbstractContextManager[Callable[[int], bool]]],
) -> training.TrainState:
  """Trains in a workdir that no other program writes into."""
  step_fn = build.train_step(config, meshes.num_shards(engine.mesh))

  def drawer(config: ConfigDict) -> previews.Preview:
    return previews.drawer(config, engine, folder, num_samples, source)

  preview, early = drawer(config), previews.in_training(config)
  early_preview = preview if early is config else drawer(early)
  batches = pipeline.batches(
    source,
    batch_size=config.batch_size,
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  begin(config, saved, allow, folder, source)
  several = jax.process_count() > 1
  many = f' of {jax.process_count()} processes' if several else ''
  logs.say(
    f'{len(source)} images, {engine.mesh.size} device(s){many}, workdir '
    f'{folder}'
  )
  if source.class_names:
    logs.say(f'classes: {dataset.listed(source.class_names)}')
  warn_of_signal(config)
  runs.warn_before_training(config, folder)

  with contextlib.ExitStack() as logged, contextlib.ExitStack() as stack:
    stop_asked = stack.enter_context(stops())
    checkpoints = checkpoint.open(
      folder / 'checkpoints',
      keep=config.checkpoint.keep,
      keep_every=config.checkpoint.keep_every,
    )
    stack.callback(checkpoint.close, checkpoints)
    # All processes raise a RunError at the same step, and saving finishes.
    stack.enter_context(processes.one_fails_all(errors.RunError))
    state = start(config, engine.mesh, checkpoints, batches, allow)
    board = logged.enter_context(
      boards.opened(
        *(folder, int(state.step)),
        project=config.log.wandb,
        config=recipe.to_json(config),
      )
    )

    def save(state: training.TrainState, step: int) -> None:
      state = engine.to_global(state)
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
      state = loop(
        *(config, engine, folder, step_fn, state),
        *(batches, save, early_preview, board, stop_asked),
      )
    except errors.Diverged as e:
      checkpoint.wait(checkpoints)  # A save in progress counts.
      raise diverged(str(e), folder) from None
    stack.close()  # A signal now ends the drawing: there is nothing to save.
    finish(config, folder, state, preview, board)
  return state


def begin(
  config: ConfigDict,
  saved: dict[str, Any],
  allow: Collection[str],
  folder: pathlib.Path,
  source: store.Source,
) -> None:
  """Writes the recipe, the classes and the data's hashes into the workdir.

  Call it after everything that may refuse the recipe.

  Args:
    config: The recipe.
    saved: The recipe to write, as JSON.
    allow: What may differ; see `train`.
    folder: The workdir.
    source: The data.

  Raises:
    UserError: If the data are not those that the run was started with.
  """
  if processes.is_primary():
    known = checkpoint.steps(folder / 'checkpoints')
    changed: dict[str, Any] = {}
    if not workdir.has_checkpoint(folder):
      if recipe.is_another(config, folder):
        logs.say(
          f'{folder} has no checkpoint: it is started again, with this recipe'
        )
    elif found := checkpoint.newest_config(folder / 'checkpoints'):
      begun = recipe.from_json(found)
      changed = recipe.changed(config, begun) if allow else {}
      if config.optimizer.decay and config.steps != begun.steps:
        changed['steps'] = [begun.steps, config.steps]
        logs.say(
          f'the learning rate falls to 0 at step {config.steps}, and not at '
          f'{begun.steps} as before'
        )
    held = source.held()
    if known and (differ := dataset.changed_data(held, folder)):
      if 'data' not in allow:
        raise errors.UserError(
          f'the data are not those that {folder} was started with ({differ}): '
          'use those, or continue with these on purpose with --allow=data'
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
  """Warns if q(x_T | x_0) is not close to the standard normal prior."""
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
  """Refuses to save a state from which training cannot continue.

  The loss of a step does not show it: it is that of the weights before the
  update.

  Raises:
    Diverged: Naming an array.
  """
  weights = {'params': state.params, 'ema': state.ema_params}
  found = fingerprint.first_beyond(weights, LARGEST) or (
    fingerprint.first_beyond({'opt_state': state.opt_state})
  )
  if found:
    name, value = found
    raise errors.Diverged(f'after step {step} {name} has grown to {value:.3g}')


def diverged(what: str, folder: pathlib.Path) -> errors.Diverged:
  """The error for a run that would diverge again if it were repeated."""
  saved = checkpoint.steps(folder / 'checkpoints')
  if not saved:
    return errors.Diverged(
      f'{what}; no checkpoint was saved in {folder} yet. Try a lower '
      '--config.optimizer.learning_rate, or another --seed'
    )
  return errors.Diverged(
    f'{what}; the last checkpoint in {folder} is of step {saved[-1]}. To '
    'resume from it, add --allow=optimizer and a lower '
    '--config.optimizer.learning_rate'
  )


def start(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  checkpoints: Any,
  batches: grain.DatasetIterator,
  allow: Collection[str] = (),
) -> training.TrainState:
  """The state of the newest intact checkpoint, or else of step 0.

  Moves `batches` to the position of that checkpoint.
  """
  init = functools.partial(build.init_state, config)
  abstract = meshes.abstract_state(init, mesh)
  saved = checkpoint.restore(
    checkpoints, checkpoint.trained(abstract), abstract.ema_params
  )
  if saved is None:
    return meshes.init_state(init, mesh)
  begun = recipe.from_json(saved.config)
  recipe.check_same(config, begun, f'checkpoint {saved.step}', allow)
  logs.say(f'resuming from step {saved.step}')
  batches.set_state(saved.data)
  return abstract.replace(**saved.state, ema_params=saved.ema)


@dataclasses.dataclass
class _Reader:
  """Reads the metrics of a step one step later: the device never waits."""

  read: Callable[[int, dict[str, jax.Array]], None]
  unread: tuple[int, dict[str, jax.Array]] | None = None

  def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
    self.flush()
    self.unread = step, metrics

  def flush(self) -> None:
    if self.unread:
      self.read(*self.unread)
      self.unread = None


def loop(
  config: ConfigDict,
  engine: engines.Engine,
  folder: pathlib.Path,
  step_fn: Callable[..., Any],
  state: training.TrainState,
  batches: grain.DatasetIterator,
  save: Callable[[training.TrainState, int], None],
  preview: previews.Preview,
  board: boards.Board,
  stop_asked: Callable[[int], bool],
) -> training.TrainState:
  """Trains to `config.steps`, or until a stop is requested; then saves."""
  train_step = logs.compiling(
    'the train step', engine.compile_step(step_fn, state)
  )
  step = int(state.step)
  every, previews_every = config.log.every, config.log.pictures_every
  rate_at = _learning_rates(config, step)

  with (
    metrics_log.opened(folder, board, step, config.batch_size) as log,
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
        values['learning_rate'] = rate_at(step)
        log.write(step, values, bar.seconds)

    reader = _Reader(read)
    while step < config.steps and not stop_asked(step):
      batch = engine.put(next(batches))
      state, metrics = train_step(state, batch)
      step += 1
      reader.push(step, metrics)
      if step % config.checkpoint.every == 0:
        reader.flush()
        log.sync()  # first: no checkpoint is ahead of the log
        save(state, step)
      # The end has a preview of its own.
      if previews_every and step % previews_every == 0 and step < config.steps:
        reader.flush()
        with bar.paused():
          preview(runs.chosen(config, state), f'_{step}')
          files = previews.paths(folder, f'_{step}')
          board.pictures(step, files)
          if processes.is_primary():
            logs.say(f'samples of step {step}: {files["samples"]}')

    reader.flush()
    log.sync()
    save(state, step)
  return state


def _learning_rates(config: ConfigDict, step: int) -> Callable[[int], float]:
  """The learning rate of each logged step after `step`.

  Computed at once and beforehand: in the loop it would wait for the device.
  """
  every = config.log.every
  first = step // every + 1
  logged = np.arange(first, config.steps // every + 1) * every
  rates = np.asarray(jax.vmap(build.learning_rate(config))(logged - 1))
  return lambda step: float(rates[step // every - first])


def finish(
  config: ConfigDict,
  folder: pathlib.Path,
  state: training.TrainState,
  preview: previews.Preview,
  board: boards.Board,
) -> None:
  """Draws the previews of a finished run, and prints what to do next."""
  step, again = int(state.step), shlex.quote(str(folder))
  if step < config.steps:
    where = ', in each process' if jax.process_count() > 1 else ''
    logs.say(
      f'stopped, and saved, at step {step} of {config.steps}; to resume{where}:'
    )
    logs.say(f'  python -m ddpm_jax.main --workdir={again}')
    return
  logs.say(f'drawing samples, {config.sampler.steps} steps each')
  runs.warn_of_ema(config, folder, step)
  preview(runs.chosen(config, state), '')
  if not processes.is_primary():
    return
  board.pictures(step, previews.paths(folder))
  steps, losses = metrics_log.curve(folder, 'loss')
  plots.save_curve(folder / 'loss.png', steps, losses, 'step', 'loss')
  logs.say(f'samples              {folder}/samples.png')
  logs.say(f'out of the noise     {folder}/progress.png')
  logs.say(f'loss                 {folder}/loss.png')
  logs.say('to draw more:')
  logs.say(
    '  python -m ddpm_jax.main --mode=sample --num_samples=100 '
    f'--workdir={again}'
  )
