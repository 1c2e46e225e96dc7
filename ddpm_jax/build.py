"""From a recipe to objects: the only place where names become functions."""

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from types import ModuleType
from typing import Any
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import recipe
from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import guidance
from ddpm_jax.diffusion import losses
from ddpm_jax.diffusion import pixels
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import spacings
from ddpm_jax.diffusion import timesteps
from ddpm_jax.diffusion import training
from ddpm_jax.diffusion import variances
from ddpm_jax.models import condition as encoders
from ddpm_jax.models import networks
from ddpm_jax.parallel import engines
from ddpm_jax.parallel import meshes


def member(module: ModuleType, name: str, what: str) -> Any:
  """Returns the function that a name in a recipe refers to.

  Args:
    module: The module whose `__all__` lists the names.
    name: One of them, or a dotted path to code outside this repository, such as
      'my_package.my_file.my_step'.
    what: The kind of function, for the message.

  Raises:
    UserError: If there is no such function; lists the known names.
  """
  if '.' in name:
    return _imported(name, what)
  if name not in module.__all__:
    raise errors.unknown(what, name, module.__all__)
  return getattr(module, name)


def _imported(path: str, what: str) -> Any:
  module, _, name = path.rpartition('.')
  try:
    return getattr(importlib.import_module(module), name)
  except Exception as e:  # a user's file may raise anything
    reason = ' '.join(str(e).split())
    raise errors.UserError(
      f'the {what} {path} cannot be imported ({type(e).__name__}: '
      f'{reason:.200}): name a function as package.file.function, of a package '
      'that Python finds from here'
    ) from e


def options(
  function: Callable, section: Mapping[str, Any], given: int = 0
) -> dict[str, Any]:
  """The keys of a section that are arguments of a function.

  Args:
    function: The function.
    section: A section of the recipe.
    given: Number of positional arguments that are not keys.
  """
  return {k: x for k, x in section.items() if reads(function, k, given)}


def reads(function: Callable, key: str, given: int = 0) -> bool:
  """Whether a key is an argument of a function; see `options`."""
  return key in list(inspect.signature(function).parameters)[given:]


def call(
  function: Callable, section: Mapping[str, Any], *args: Any, of: str
) -> Any:
  """Calls `function` with `args` and its `options` of a section.

  Args:
    function: The function.
    section: A section of the recipe.
    *args: Positional arguments.
    of: The name of the section, such as 'sampler'.

  Raises:
    UserError: If `function` raises ValueError, with the keys that it is about.
  """
  passed = options(function, section, len(args))
  try:
    return function(*args, **passed)
  except errors.UserError:
    raise
  except ValueError as e:
    raise errors.UserError(_with_keys(str(e), passed, of)) from e


def _with_keys(message: str, passed: Mapping[str, Any], section: str) -> str:
  """Adds the keys that a message is about: those it names, or else all."""
  if 'config.' in message:
    return message
  keys = {k: v for k, v in passed.items() if not callable(v)}
  about = [k for k in keys if re.search(rf'\b{k}\b', message)] or list(keys)
  said = ', '.join(f'config.{section}.{k}={keys[k]}' for k in about)
  return f'{said or f"config.{section}"}: {message}'


def schedule(config: ConfigDict) -> schedules.Schedule:
  """The schedule with all T steps.

  Raises:
    UserError: If the name is unknown, or a value is not valid.
  """
  c = config.schedule
  made = call(member(schedules, c.name, 'schedule'), c, of='schedule')
  if c.zero_terminal_snr:
    of = 'schedule.zero_terminal_snr'
    made = call(schedules.zero_terminal_snr, {}, made, of=of)
  return made


def network(config: ConfigDict) -> nn.Module:
  """The linen module: `network.apply(variables, x_t, t, keys=None)`.

  If the recipe has a condition, it is the argument after t. In training, keys
  (B,) are for dropout.

  Raises:
    UserError: If the name is unknown, or it does not fit the image size.
  """
  make = member(networks, config.model.name, 'model')
  channels = config.data.channels
  if variances.is_learned(config.model.variance):
    channels *= 2
  size = recipe.image_size(config)
  made = call(make, config.model, size, channels, of='model')
  read = encoder(config)
  return encoders.Conditional(made, read) if read else made


def encoder(config: ConfigDict) -> Any:
  """The linen module that encodes the condition; None if there is none.

  Raises:
    UserError: If the number of classes is not known.
  """
  c = config.condition
  if not c.name:
    return None
  if recipe.condition_kind(config) == 'label' and not c.classes:
    raise errors.UserError(
      'config.condition.classes=0 is for training, where the data say how '
      'many there are: set it'
    )
  return call(member(encoders, c.name, 'condition'), c, of='condition')


def denoiser(
  config: ConfigDict,
  schedule: schedules.Schedule,
  network: denoisers.Network,
  *,
  sampling: bool = False,
) -> denoisers.Denoiser:
  """The denoiser of a network, with the recipe's prediction and variance.

  Args:
    config: The recipe.
    schedule: The schedule with all T steps.
    network: (x_t, t) -> output.
    sampling: Whether to use `sampler.variance`, for sampling and evaluation, or
      `model.variance`, for training.
  """
  variance = (config.sampler if sampling else config.model).variance
  return denoisers.Denoiser(
    schedule,
    network,
    member(predictions, config.model.predict, 'prediction'),
    member(variances, variance, 'variance'),
  )


def applied(
  module: nn.Module, params: Any, condition: Any = None
) -> denoisers.Network:
  """The network with weights and, if there is one, a condition."""
  args = () if condition is None else (condition,)

  def apply(x_t: jax.Array, t: jax.Array) -> Any:
    return module.apply({'params': params}, x_t, t, *args)

  return apply


class Sampler(NamedTuple):
  """The sampler of a recipe.

  Attributes:
    step: The sampler's step.
    schedule: The schedule with `sampler.steps` steps.
    denoiser: (params, condition=None) -> the denoiser on that schedule.
  """

  step: samplers.Step
  schedule: schedules.Schedule
  denoiser: Callable[..., denoisers.Denoiser]


def sampler(config: ConfigDict) -> Sampler:
  """The sampler of a recipe.

  Raises:
    UserError: If a name is unknown, or a value is not valid.
  """
  c, module, full = config.sampler, network(config), schedule(config)
  function = member(samplers, c.name, 'sampler')
  step = functools.partial(function, **options(function, c, given=5))
  spacing = member(spacings, c.spacing, 'spacing')
  strided = {'steps': c.steps, 'spacing': spacing}
  short = call(schedules.stride, strided, full, of='sampler')

  def of_weights(params: Any, condition: Any = None) -> denoisers.Denoiser:
    if condition is None:
      apply = applied(module, params)
      made = denoiser(config, full, apply, sampling=True)
    else:
      made = _guided(config, full, module, params, condition)
    return made._replace(schedule=short, clip=c.clip)

  return Sampler(step, short, of_weights)


def _guided(
  config: ConfigDict,
  schedule: schedules.Schedule,
  module: nn.Module,
  params: Any,
  condition: Any,
) -> denoisers.Denoiser:
  """The denoiser given a condition, which is encoded once for all steps."""
  s = config.sampler
  apply: Any = functools.partial(module.apply, {'params': params})
  encode = functools.partial(apply, method='encode')
  denoise = functools.partial(apply, method='denoise')
  made = denoiser(config, schedule, denoise, sampling=True)
  context = encode(condition)
  if s.guidance == 1:
    return guidance.conditioned(made, context)
  n = len(jax.tree.leaves(condition)[0])
  return guidance.guided(
    made,
    context,
    encode(encoder(config).nothing(n)),
    scale=s.guidance,
    interval=tuple(s.guidance_interval),
    rescale=s.guidance_rescale,
  )


def condition(
  config: ConfigDict, batch: dict[str, Any], keys: jax.Array | None = None
) -> Any:
  """The conditions of a batch; None if the recipe has none.

  Args:
    config: The recipe.
    batch: A batch of the recipe's data.
    keys: (B,), for training: they choose one caption of each example, and drop
      it with probability `condition.drop`. Without keys, the first caption.
  """
  c = config.condition
  if not c.name:
    return None
  if recipe.condition_kind(config) == 'label':
    given = batch['label']
  elif keys is None:
    given = jax.tree.map(lambda x: x[:, 0], batch['text'])
  else:
    K = jax.tree.leaves(batch['text'])[0].shape[1]
    which = jax.vmap(lambda k: jax.random.randint(k, (), 0, K))(keys)
    given = jax.vmap(lambda x, k: jax.tree.map(lambda a: a[k], x))(
      batch['text'], which
    )
  if keys is None:
    return given
  nothing = encoder(config).nothing(len(keys))
  # Independent of the choice of the caption.
  others = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
  dropped = jax.vmap(lambda k: jax.random.bernoulli(k, c.drop))(others)
  return jax.vmap(
    lambda drop, a, b: jax.tree.map(lambda x, y: jnp.where(drop, x, y), a, b)
  )(dropped, nothing, given)


def init_state(config: ConfigDict) -> training.TrainState:
  """The training state at step 0. Call it under jit."""
  x = jnp.zeros((1, *recipe.shape(config)))
  t = jnp.ones(1, jnp.int32)
  params = network(config).init(key(config.seed, 'init'), x, t)['params']
  return begin(config, params)


def begin(config: ConfigDict, params: Any) -> training.TrainState:
  """The training state at step 0 with given weights. Call it under jit."""
  by_history = config.loss.t == 'importance'
  return training.TrainState.create(
    apply_fn=network(config).apply,
    params=params,
    # A copy: a donated state must not contain a buffer twice.
    ema_params=jax.tree.map(jnp.copy, params),
    tx=optimizer(config),
    history=timesteps.no_history(config.schedule.T) if by_history else None,
  )


def loss_fn(config: ConfigDict) -> Callable[..., tuple[jax.Array, Any]]:
  """Algorithm 1 for a batch, as an argument of `training.train_step`.

  The random numbers of an example depend on `key` and its `batch['index']`
  alone.
  """
  module, table, n = network(config), schedule(config), config.batch_size
  function = member(losses, config.loss.name, 'loss')
  loss = functools.partial(function, **options(function, config.loss, given=4))
  draw_t = member(timesteps, config.loss.t, 'choice of t')
  fold = jax.vmap(jax.random.fold_in, (None, 0))

  def losses_of(
    params: Any,
    key: jax.Array,
    batch: dict[str, jax.Array],
    history: timesteps.History | None = None,
  ) -> tuple[jax.Array, Any]:
    k_flip, k_t, k_eps, k_drop, k_cond = jax.random.split(key, 5)
    index = batch['index']
    x0 = pixels.to_float(batch['image'])
    if config.data.flip:
      x0 = pixels.random_flip(fold(k_flip, index), x0)
    given = condition(config, batch, fold(k_cond, index))
    args = () if given is None else (given,)

    def apply(x_t: jax.Array, t: jax.Array) -> Any:
      keys = fold(k_drop, index)
      return module.apply({'params': params}, x_t, t, *args, keys=keys)

    model, T = denoiser(config, table, apply), table.T
    # The probability of each t, if t is drawn by its past losses.
    p = None if history is None else timesteps.probabilities(history)
    draw = draw_t if p is None else functools.partial(draw_t, p=p)
    t = jax.vmap(lambda i: draw(k_t, i, n, T))(index)
    values = loss(model, fold(k_eps, index), x0, t)
    weight = 1.0 if p is None else 1 / (T * p[t - 1])
    return weight * values, (index, t, values)

  return losses_of


def train_step(config: ConfigDict, devices: int) -> Callable:
  """`training.train_step` for a recipe and a number of batch shards.

  Raises:
    UserError: If they do not divide the batch.
  """
  if config.batch_size % (devices * config.accumulate):
    raise errors.UserError(
      f'config.batch_size={config.batch_size} is not divisible by {devices} '
      f'device(s) times config.accumulate={config.accumulate}'
    )
  return functools.partial(
    training.train_step,
    loss_fn=loss_fn(config),
    key=key(config.seed, 'train'),
    ema=config.optimizer.ema,
    accumulate=config.accumulate,
  )


def key(seed: int, use: str) -> jax.Array:
  """The key for one use of a seed."""
  uses = ('init', 'train', 'sample', 'evaluate', 'codec')
  return jax.random.fold_in(jax.random.key(seed), uses.index(use))


def learning_rate(config: ConfigDict) -> optax.Schedule:
  """The learning rate by number of earlier steps.

  It rises linearly from 0 in `warmup` steps. Then it is constant, or decays to
  0 at `steps`.
  """
  c = config.optimizer
  rate, falling = c.learning_rate, max(config.steps - c.warmup, 1)
  after = {
    '': optax.constant_schedule(rate),
    'linear': optax.linear_schedule(rate, 0, falling),
    'cosine': optax.cosine_decay_schedule(rate, falling),
  }[c.decay]
  if not c.warmup:
    return after
  rise = optax.linear_schedule(0, rate, c.warmup)
  return optax.join_schedules([rise, after], [c.warmup])


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """Adam with `learning_rate`, after clipping by global norm."""
  c = config.optimizer
  varies = c.warmup or c.decay
  rate = learning_rate(config) if varies else c.learning_rate
  return optax.chain(
    optax.clip_by_global_norm(c.clip),
    optax.adam(rate, c.beta_1, c.beta_2, c.eps),
  )


def mesh(
  config: ConfigDict,
  *,
  local: bool = False,
  devices: Sequence[Any] | None = None,
) -> jax.sharding.Mesh:
  """The mesh of a recipe; with `local`, of this process's devices alone.

  Raises:
    UserError: If there are too few devices.
  """
  wanted = config.parallel
  return meshes.make_mesh(
    *(wanted.data, wanted.fsdp, wanted.spatial), local=local, devices=devices
  )


def engine(
  config: ConfigDict,
  *,
  local: bool = False,
  on: jax.sharding.Mesh | None = None,
) -> engines.Engine:
  """The recipe's engine, `jit` or `pmap`, on its devices.

  Args:
    config: The recipe.
    local: Whether to use the devices of this process alone.
    on: Another mesh than the recipe's.

  Raises:
    UserError: If there are too few devices.
  """
  made = mesh(config, local=local) if on is None else on
  return engines.ENGINES[config.parallel.engine](made)
