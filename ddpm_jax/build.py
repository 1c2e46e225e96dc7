"""From a recipe to objects: the only place where names become functions."""

import importlib
import inspect
import logging
import pathlib
import pkgutil
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ddpm_jax import checks
from ddpm_jax import conditioning
from ddpm_jax import errors
from ddpm_jax import models
from ddpm_jax import recipe
from ddpm_jax import registry
from ddpm_jax.data import contents
from ddpm_jax.data import sources
from ddpm_jax.data import store
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import objectives
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import variances
from ddpm_jax.runtime import checkpoint
from ddpm_jax.runtime import logs
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime import paths
from ddpm_jax.runtime import workdir

# Keys that are read whatever the name of their section is: by conditioning.py,
# by the evaluation, and as names themselves.
READ_ELSEWHERE = ('data.captions', 'data.names', 'data.split', 'loss.t')


def reverse(config: ConfigDict, variance: str) -> dict[str, Any]:
  """`predict` and `variance`, for the functions of the reverse process.

  Raises:
    UserError: if there are none of the names, or the network was not made for
      this variance.
  """
  kinds = {
    name: value
    for name, value in vars(predictions).items()
    if isinstance(value, predictions.Prediction)
  }
  predict, trained = config.model.predict, config.model.variance
  if predict not in kinds:
    raise errors.unknown('prediction', predict, kinds)
  function = registry.named(variances, variance, 'raw', 'variance')
  if variance != trained and any(
    variances.is_learned(name) for name in (variance, trained)
  ):
    raise errors.UserError(
      f'config.sampler.variance={variance} does not fit the network, whose '
      f'config.model.variance is {trained}'
    )
  return {'predict': kinds[predict], 'variance': function}


def warn_of_signal(config: ConfigDict) -> None:
  """Warns if x_T is not nearly the standard normal of the prior."""
  table = schedule(config)
  bits = likelihood.prior(table, jnp.ones(1)) * likelihood.BITS
  # The paper's is 3e-5 for x_0 = ±1.
  if bits > 1e-3:
    logging.warning(
      'x_T still holds something of x_0: log ᾱ_T = %.3g (the paper: -10.1), '
      'KL(q(x_T | x_0) ‖ N(0, I)) = %.2g bits/dim; samples may suffer; raise '
      'config.schedule.T or beta_T',
      table.log_alpha_bar[-1],
      bits,
    )


def check_used(
  config: ConfigDict, said: Collection[str], changes: Collection[str] = ()
) -> None:
  """Refuses keys that the function chosen by name does not take, others do.

  Args:
    config: the recipe.
    said: the keys that the user sets now. A run that was saved with others is
      not refused for them.
    changes: those of them that are on the command line.

  Raises:
    UserError: naming the first such key that is not at its default.
  """
  registries: dict[str, dict[str, Callable]] = {
    'data': registry.known(sources),
    'schedule': registry.known(schedules, 'T'),
    'model': {name: file.build for name, file in networks().items()},
    'loss': registry.known(objectives, 'model_fn'),
    'sampler': registry.known(samplers, 'x_t'),
  }
  default = recipe.defaults()
  default['sampler.variance'] = config.model.variance
  for section, members in registries.items():
    keys, name = config[section], config[section].name
    if name not in members:
      continue  # is refused by those who call it
    for key in registry.unused(members, name, keys):
      full = f'{section}.{key}'
      if full not in said or full in READ_ELSEWHERE or full not in default:
        continue
      if keys[key] != default[full]:
        mend = f'set config.{full}={default[full]}'
        raise errors.UserError(
          f'config.{full}={keys[key]} is not used by config.{section}.name='
          f'{name}: {"leave it out" if full in changes else mend}'
        )


def networks() -> dict[str, Any]:
  """The files of models/ that build a network, by name."""
  files = {
    m.name: importlib.import_module(f'ddpm_jax.models.{m.name}')
    for m in pkgutil.iter_modules(models.__path__)
  }
  return {name: file for name, file in files.items() if hasattr(file, 'build')}


def model(config: ConfigDict) -> nn.Module:
  """The linen module: `model.apply(variables, x_t, t, keys=None)`.

  It takes a condition after t, if the recipe has one, and in training keys (B,)
  for what is random.
  """
  name, known = config.model.name, networks()
  if name not in known:
    raise errors.unknown('model', name, known)
  channels = config.data.channels
  if variances.is_learned(config.model.variance):
    channels *= 2
  size = recipe.image_size(config)
  network = registry.call(
    known[name].build, config.model, size, channels, of='model'
  )
  return conditioning.wrap(config, network)


def schedule(config: ConfigDict) -> schedules.Schedule:
  """The schedule of all T steps.

  Raises:
    UserError: if there is none of the name, or the prediction does not fit it.
  """
  c = config.schedule
  function = registry.named(schedules, c.name, 'T', 'schedule')
  table = registry.call(function, c, of='schedule')
  if c.zero_terminal_snr:
    of = 'schedule.zero_terminal_snr'
    table = registry.call(schedules.zero_terminal_snr, {}, table, of=of)
  if schedules.ends_in_noise(table) and config.model.predict == 'eps':
    key = 'zero_terminal_snr' if c.zero_terminal_snr else f'name={c.name}'
    raise errors.UserError(
      f'config.schedule.{key} leaves nothing of x_0 in x_T, so that ε does not '
      'tell x_0 there: set config.model.predict to v or x0'
    )
  return table


def source(
  config: ConfigDict, split: str = '', folder: pathlib.Path | None = None
) -> Any:
  """The data set, or another split of it; see `data/sources.py`.

  Args:
    config: the recipe.
    split: '': that of the recipe.
    folder: of the run whose classes it shall have, in their order.

  Raises:
    UserError: the data are missing or do not fit, or have no splits and one is
      named.
  """
  paths.of_key('data.path', config.data.get('path') or '.', paths.local)
  function = registry.named(sources, config.data.name, None, 'data set')
  if not _takes(function, 'split'):
    _refuse_split(config, 'data.split', config.data.split, 'train')
  data = dict(config.data) | {'image_size': recipe.image_size(config)}
  data |= {'split': split} if split else {}
  data['needs_labels'] = (
    config.condition.name == 'label' or config.data.captions == 'classes'
  )
  if (
    folder
    and _takes(function, 'class_order')
    and workdir.keeps_no_classes(folder)
  ):
    data |= {'class_order': str}  # that of runs which saved no names
  made = registry.call(function, data, of='data')
  if folder and checkpoint.steps(folder / 'checkpoints'):
    made = _as_saved(config, made, folder)
  return conditioning.attach(config, made)


def changed_data(now: contents.Contents, folder: pathlib.Path) -> str:
  """How the data differ from those that the run was begun with; or ''.

  Runs of earlier versions did not keep what theirs were.
  """
  saved = workdir.read_data(folder)
  if saved is None:
    return ''
  return contents.changes(contents.Contents(*saved), now)


def _as_saved(
  config: ConfigDict, made: store.Source, folder: pathlib.Path
) -> store.Source:
  """The source with its classes in the order that the run has saved."""
  names = workdir.read_classes(folder)
  if names is None or names == made.class_names:
    return made
  if sorted(names) == sorted(made.class_names) and len(set(names)) == len(
    names
  ):
    return store.relabelled(made, names)
  if conditioning.reads_classes(config):
    raise other_classes(made.class_names, names, folder)
  return made


def other_classes(
  here: Sequence[str], saved: Sequence[str], folder: pathlib.Path
) -> errors.UserError:
  """The error for data whose classes are not those of the run."""
  new = [f'{name!r} is new' for name in here if name not in saved]
  gone = [f'{name!r} is missing' for name in saved if name not in here]
  return errors.UserError(
    f'the classes of the data are not those of {folder}/classes.json '
    f'({", ".join([*new[:2], *gone[:2]])}): give it the data that it was begun '
    'with, or name another --workdir'
  )


def split_to_evaluate(config: ConfigDict) -> str:
  """The name of the split to evaluate on; 'all' for data without splits.

  Raises:
    UserError: the data have no splits, and one is named.
  """
  function = registry.named(sources, config.data.name, None, 'data set')
  if _takes(function, 'split'):
    return config.evaluate.split or config.data.split
  _refuse_split(config, 'evaluate.split', config.evaluate.split, '')
  return 'all'


def source_to_evaluate(
  config: ConfigDict, folder: pathlib.Path | None = None
) -> tuple[store.Source, str]:
  """The images to evaluate on, and the name of their split; see `source`.

  Warns if they are the training data, and those have changed.
  """
  name = split_to_evaluate(config)
  found = source(config, config.evaluate.split, folder)
  if folder and config.evaluate.split in ('', config.data.split):
    warn_of_data(found, folder)
  return found, name


def warn_of_data(source: store.Source, folder: pathlib.Path) -> None:
  """Warns if the data are not those that the run was begun with."""
  if differ := changed_data(source.held(), folder):
    logging.warning(
      'the data are not those that %s was trained on: %s', folder, differ
    )


def _takes(function: Callable[..., Any], argument: str) -> bool:
  return argument in inspect.signature(function).parameters


def _refuse_split(
  config: ConfigDict, key: str, value: str, default: str
) -> None:
  if value != default:
    raise errors.UserError(
      f'config.{key}={value}: the data set {config.data.name} has no splits; '
      f"set config.{key}='{default}'"
    )


def mesh(
  config: ConfigDict,
  *,
  local: bool = False,
  devices: Sequence[Any] | None = None,
) -> jax.sharding.Mesh:
  """The devices of a run; with `local`, those of this process.

  Raises:
    UserError: if there are not as many, or the engine is not for them, or the
      images cannot be cut so often.
  """
  wanted = config.parallel
  if wanted.engine not in parallel.ENGINES:
    raise errors.unknown('engine', wanted.engine, parallel.ENGINES)
  if wanted.engine == 'pmap' and wanted.fsdp > 1:
    raise errors.UserError(
      'pmap keeps the whole state on every device: set parallel.fsdp=1, or '
      'parallel.engine=jit'
    )
  if wanted.engine == 'pmap' and jax.process_count() > 1:
    raise errors.UserError(
      'pmap is for one process: set parallel.engine=jit, which does the same'
    )
  if wanted.spatial > 1:
    checks.spatial(config)
  return parallel.make_mesh(
    *(wanted.data, wanted.fsdp, wanted.spatial), local=local, devices=devices
  )


def fit_devices(config: ConfigDict, *, trains: bool) -> ConfigDict:
  """A saved recipe, on the devices here if those that it names do not fit.

  What a run says of devices was right for the machine that it was begun on.

  Args:
    config: of the run; not changed.
    trains: whether the devices must share `batch_size` evenly. If those here
      cannot, as many are used as can.
  """

  def share(parts: int) -> bool:
    return not trains or config.batch_size % (parts * config.accumulate) == 0

  try:
    if share(parallel.parts(mesh(config))):
      return config
  except errors.UserError:
    pass  # not these devices
  here, was = len(jax.devices()), config.parallel
  several = jax.process_count() > 1  # which must use all
  used = max((n for n in range(1, here + 1) if share(n)), default=0)
  if not used or (several and used < here):
    return config  # is refused by those who train
  logs.say(
    f'the devices of this run (config.parallel.data={was.data}, fsdp='
    f'{was.fsdp}, spatial={was.spatial}) do not fit here: using {used} of '
    f'{here} device(s)'
  )
  fitted = config.copy_and_resolve_references()
  fitted.parallel.update(data=-1 if used == here else used, fsdp=1, spatial=1)
  if several:
    fitted.parallel.engine = 'jit'  # pmap is for one process
  return fitted.lock()


def stream(seed: int, use: str) -> jax.Array:
  """The key of one use of a seed."""
  uses = ('init', 'train', 'sample', 'evaluate', 'codec')
  return jax.random.fold_in(jax.random.key(seed), uses.index(use))


def learning_rate(config: ConfigDict) -> optax.Schedule:
  """Of the number of steps made before: a linear warm-up from 0."""
  c = config.optimizer
  if not c.warmup:
    return optax.constant_schedule(c.learning_rate)
  return optax.linear_schedule(0, c.learning_rate, c.warmup)


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """Adam with a learning rate that warms up, after clipping by global norm."""
  c, rate = config.optimizer, learning_rate(config)
  return optax.chain(
    optax.clip_by_global_norm(c.clip),
    optax.adam(
      rate if c.warmup else c.learning_rate, c.beta_1, c.beta_2, c.eps
    ),
  )
