"""From a recipe to objects: the only place where names become functions."""

import functools
import importlib
import inspect
import itertools
import logging
import pkgutil
from collections.abc import Callable
from collections.abc import Container
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

from ddpm_jax import conditioning
from ddpm_jax import errors
from ddpm_jax import models
from ddpm_jax import recipe
from ddpm_jax.data import sources
from ddpm_jax.diffusion import codec as codec_parts
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import objectives
from ddpm_jax.diffusion import pixels
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import spacings
from ddpm_jax.diffusion import timesteps
from ddpm_jax.diffusion import training
from ddpm_jax.diffusion import variances
from ddpm_jax.metrics import inception
from ddpm_jax.runtime import parallel

POSITIVE = (
  'steps',
  'batch_size',
  'accumulate',
  'model.blocks',
  'schedule.T',
  'sampler.batch_size',
  'codec.steps',
  'codec.batch_size',
  'evaluate.batch_size',
  'checkpoint.every',
  'checkpoint.keep',
  'log.every',
)


def functions(
  module: ModuleType, argument: str | None = None
) -> dict[str, Callable]:
  """The functions of a module, by name; those with an argument of that name.

  An argument is what makes a function a schedule or a sampler, not a helper.
  """
  return {
    name: f
    for name, f in inspect.getmembers(module, inspect.isfunction)
    if f.__module__ == module.__name__
    and not name.startswith('_')
    and (not argument or argument in inspect.signature(f).parameters)
  }


def named(
  module: ModuleType, name: str, argument: str | None, what: str
) -> Callable:
  """The function `name` among the `functions` of a module.

  Raises:
    UserError: if there is none, naming those there are.
  """
  known = functions(module, argument)
  if name not in known:
    raise errors.unknown(what, name, known)
  return known[name]


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
  function = named(variances, variance, 'raw', 'variance')
  if variance != trained and any(
    variances.is_learned(name) for name in (variance, trained)
  ):
    raise errors.UserError(
      f'config.sampler.variance={variance} does not fit the network, whose '
      f'config.model.variance is {trained}'
    )
  return {'predict': kinds[predict], 'variance': function}


def check_loss(config: ConfigDict) -> None:
  """Refuses combinations that cannot learn what they should.

  Raises:
    UserError: with the reason.
  """
  loss, model = config.loss.name, config.model
  learns = variances.is_learned(model.variance)
  if learns and loss not in ('vlb', 'hybrid'):
    raise errors.UserError(
      f'config.loss.name={loss} does not look at the variance, so that '
      f'config.model.variance={model.variance} would not be learned; take vlb '
      'or hybrid, or a fixed variance'
    )
  if not learns and loss == 'hybrid':
    raise errors.UserError(
      'config.loss.name=hybrid is for a learned variance; set '
      'config.model.variance=learned_range'
    )
  if loss == 'min_snr' and model.predict == 'mu':
    raise errors.UserError(
      'config.loss.name=min_snr weighs the error of x_0, which μ̃ does not tell '
      'at large t; set config.model.predict to eps, x0 or v'
    )


def call(function: Callable, section: Mapping[str, Any], *args: Any) -> Any:
  """Calls `function` with the keys of a section that it has arguments for.

  Raises:
    UserError: for a value that `function` refuses.
  """
  names = inspect.signature(function).parameters
  try:
    return function(*args, **{k: v for k, v in section.items() if k in names})
  except ValueError as e:
    raise errors.UserError(str(e)) from e


def image_size(config: ConfigDict) -> tuple[int, ...]:
  """(height, width) in pixels, or () where the data are points.

  Raises:
    UserError: if the recipe says something else.
  """
  size = config.data.image_size
  pair = size if isinstance(size, tuple) else (size, size)
  whole = all(isinstance(n, int) and n > 0 for n in pair)
  if len(pair) not in (0, 2) or not whole:
    raise errors.UserError(
      f'config.data.image_size={size!r} is not a side, such as 32, or '
      '(height, width)'
    )
  return pair


def shape(config: ConfigDict) -> tuple[int, ...]:
  """Of one example: (height, width, channels), or (channels,) of a point."""
  return (*image_size(config), config.data.channels)


def check(config: ConfigDict) -> None:
  """Refuses what would only come to light after seconds or hours.

  Raises:
    UserError: for a number that must be positive, an unknown data set, or
      channels that are neither gray nor RGB.
  """
  flat = recipe.flatten(config)
  for key in POSITIVE:
    if flat[key] < 1:
      raise errors.UserError(f'config.{key}={flat[key]} must be at least 1')
  named(sources, config.data.name, None, 'data set')
  conditioning.check(config)
  if not image_size(config) and config.data.flip:
    raise errors.UserError(
      'points have no left and right to mirror: set config.data.flip=false'
    )
  if image_size(config) and config.data.channels not in (1, 3):
    raise errors.UserError(
      f'config.data.channels={config.data.channels} is not 1 (gray) or 3 (RGB)'
    )


def warn_of_signal(config: ConfigDict) -> None:
  """Warns if x_T is not nearly the standard normal of the prior."""
  bits = likelihood.prior(schedule(config), jnp.ones(1)) * likelihood.BITS
  # The paper's is 3e-5 for x_0 = ±1.
  if bits > 1e-3:
    logging.warning(
      'x_T still holds something of x_0, KL(q(x_T | x_0) ‖ N(0, I)) = %.2g '
      'bits/dim: samples may suffer; raise config.schedule.T or beta_T',
      bits,
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
  network = call(known[name].build, config.model, image_size(config), channels)
  return conditioning.wrap(config, network)


def schedule(config: ConfigDict) -> schedules.Schedule:
  """The schedule of all T steps.

  Raises:
    UserError: if there is none of the name, or the prediction does not fit it.
  """
  function = named(schedules, config.schedule.name, 'T', 'schedule')
  table = call(function, config.schedule)
  if not config.schedule.zero_terminal_snr:
    return table
  if config.model.predict == 'eps':
    raise errors.UserError(
      'config.schedule.zero_terminal_snr leaves nothing of x_0 in x_T, so that '
      'ε does not tell x_0 there: set config.model.predict to v or x0'
    )
  return call(schedules.zero_terminal_snr, {}, table)


def source(config: ConfigDict, split: str = '') -> Any:
  """The data set, or another split of it; see `data/sources.py`."""
  function = named(sources, config.data.name, None, 'data set')
  data = dict(config.data) | {'image_size': image_size(config)}
  made = call(function, data | ({'split': split} if split else {}))
  return conditioning.attach(config, made)


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
    check_spatial(config)
  return parallel.make_mesh(
    *(wanted.data, wanted.fsdp, wanted.spatial), local=local, devices=devices
  )


def check_spatial(config: ConfigDict) -> None:
  """Refuses images whose rows cannot be cut so often.

  Raises:
    UserError: with what can be done.
  """
  n = config.parallel.spatial
  if config.parallel.engine == 'pmap':
    raise errors.UserError(
      'pmap keeps an image on one device: set parallel.spatial=1, or '
      'parallel.engine=jit'
    )
  if not image_size(config):
    raise errors.UserError('points have no rows: set parallel.spatial=1')
  rows, levels = image_size(config)[0], len(config.model.multipliers)
  least = rows // config.model.patch // 2 ** (levels - 1)
  if least % n:
    raise errors.UserError(
      f'config.parallel.spatial={n} does not divide the {least} row(s) that '
      f'{rows} have become at the smallest of {levels} levels'
    )


def stream(seed: int, use: str) -> jax.Array:
  """The key of one use of a seed."""
  uses = ('init', 'train', 'sample', 'evaluate', 'codec')
  return jax.random.fold_in(jax.random.key(seed), uses.index(use))


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """Adam with a linear warm-up from 0, after clipping by global norm."""
  c = config.optimizer
  rate = optax.linear_schedule(0, c.learning_rate, c.warmup)
  return optax.chain(
    optax.clip_by_global_norm(c.clip),
    optax.adam(
      rate if c.warmup else c.learning_rate, c.beta_1, c.beta_2, c.eps
    ),
  )


def init_state(config: ConfigDict) -> training.TrainState:
  """The state at step 0. Call it under jit."""
  network = model(config)
  x = jnp.zeros((1, *shape(config)))
  t = jnp.ones(1, jnp.int32)
  params = network.init(stream(config.seed, 'init'), x, t)['params']
  return begin(config, params)


def begin(config: ConfigDict, params: Any) -> training.TrainState:
  """The state at step 0 with these weights. Call it under jit."""
  by_history = config.loss.t == 'importance'
  return training.TrainState.create(
    apply_fn=model(config).apply,
    params=params,
    # A copy: a donated state must not hold one buffer twice.
    ema_params=jax.tree.map(jnp.copy, params),
    tx=optimizer(config),
    history=timesteps.no_history(config.schedule.T) if by_history else None,
  )


def loss_fn(config: ConfigDict) -> Callable[..., tuple[jax.Array, Any]]:
  """Algorithm 1 for a batch of images, as `training.train_step` wants it.

  The randomness of an example follows from `key` and its `batch['index']`.
  """
  network, table = model(config), schedule(config)
  objective = named(objectives, config.loss.name, 'model_fn', 'loss')
  options = reverse(config, config.model.variance)
  check_loss(config)
  draw_t = named(timesteps, config.loss.t, 'key', 'choice of t')
  n, T = config.batch_size, table.T
  fold = jax.vmap(jax.random.fold_in, (None, 0))

  def loss(
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
    # Of each t, where it is drawn by its losses of the past.
    p = None if history is None else timesteps.probabilities(history)
    draw = draw_t if p is None else functools.partial(draw_t, p=p)
    t = jax.vmap(lambda i: draw(k_t, i, n, T))(index)

    told = conditioning.of_batch(config, batch, fold(k_cond, index))
    args = () if told is None else (told,)

    def model_fn(x_t: jax.Array, t: jax.Array) -> Any:
      keys = fold(k_drop, index)
      return network.apply({'params': params}, x_t, t, *args, keys=keys)

    losses = objective(table, model_fn, fold(k_eps, index), x0, t, **options)
    weight = 1.0 if p is None else 1 / (T * p[t - 1])
    return weight * losses, (index, t, losses)

  return loss


def train_step(config: ConfigDict, devices: int) -> Callable:
  """`training.train_step` for a recipe; `devices` will share the batch.

  Raises:
    UserError: if they cannot share it evenly.
  """
  if config.batch_size % (devices * config.accumulate):
    raise errors.UserError(
      f'config.batch_size={config.batch_size} is not divisible by {devices} '
      f'device(s) times config.accumulate={config.accumulate}'
    )
  return functools.partial(
    training.train_step,
    loss_fn=loss_fn(config),
    key=stream(config.seed, 'train'),
    ema=config.optimizer.ema,
    accumulate=config.accumulate,
  )


class Reverse(NamedTuple):
  """What a sampler needs, for functions of the weights `params`."""

  step: samplers.Step
  schedule: schedules.Schedule
  # Of the weights, and of a condition if the recipe has one (else: nothing).
  model_fn: Callable[..., process.ModelFn]


def reverse_process(config: ConfigDict) -> Reverse:
  """The sampler of a recipe, on its (perhaps shorter) schedule."""
  c, network = config.sampler, model(config)
  step = named(samplers, c.name, 'x_t', 'sampler')
  spacing = named(spacings, c.spacing, 'steps', 'spacing')
  strided = {'steps': c.steps, 'spacing': spacing}
  short = call(schedules.stride, strided, schedule(config))
  names = inspect.signature(step).parameters
  options = {**c, **reverse(config, c.variance)}
  options = {k: v for k, v in options.items() if k in names}
  check_sampler(config, names)

  def model_fn(params: Any, condition: Any = None) -> process.ModelFn:
    if condition is not None:
      return conditioning.model_fn(config, network, params, condition)
    return lambda x_t, t: network.apply({'params': params}, x_t, t)  # type: ignore[return-value]

  return Reverse(functools.partial(step, **options), short, model_fn)


def check_sampler(config: ConfigDict, options: Container[str]) -> None:
  """Refuses what a sampler with these options cannot do, or would not look at.

  Raises:
    UserError: with the reason.
  """
  c, T = config.sampler, config.schedule.T
  if not 0 <= c.eta <= 1:
    raise errors.UserError(f'config.sampler.eta={c.eta} must be in 0..1')
  if c.eta and 'eta' not in options:
    raise errors.UserError(
      f'config.sampler.eta={c.eta} is of ddim; {c.name} has none'
    )
  if config.schedule.zero_terminal_snr and c.spacing == 'leading':
    raise errors.UserError(
      'config.sampler.spacing=leading does not begin at T, where '
      'config.schedule.zero_terminal_snr has its zero; set linear or quadratic'
    )
  # Both are of one step of T, and say nothing of a jump.
  of_a_step = {
    'model.predict': config.model.predict == 'mu',
    'sampler.variance': c.variance == 'learned' and 'variance' in options,
  }
  for key, wrong in of_a_step.items():
    if wrong and c.steps < T:
      raise errors.UserError(
        f'config.{key}={recipe.flatten(config)[key]} is learned for the step '
        f'from t to t - 1, not for jumps: set config.sampler.steps={T}'
      )


def noise(config: ConfigDict, seed: int, index: jax.Array) -> Any:
  """(keys, x_T) of the samples `index` of a seed."""
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  keys = fold(stream(seed, 'sample'), index)
  # Steps fold in their t ≥ 1, so 0 is left for x_T.
  first = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
  return keys, process.normal(first, shape(config))


def index_and_condition(rows: Any) -> tuple[jax.Array, Any]:
  """What `sampler` takes, of either form; the condition may be None."""
  if isinstance(rows, dict):
    return rows['index'], rows.get('condition')
  return rows, None


def sampler(
  config: ConfigDict,
  seed: int,
  snapshots: int = 0,
  cut: Callable[[jax.Array], jax.Array] = lambda images: images,
) -> Callable:
  """(params, rows) -> images (B, H, W, C), predictions (B, K, H, W, C).

  Both uint8; or points, float32. `rows` holds `index` (B,) and, if the recipe
  has one, a `condition`; or it is the index alone, and then the classes take
  turns, or nothing is asked for. Image `index` of a seed is the same in a batch
  of any size. `cut` may spread images over devices.
  """
  p = reverse_process(config)

  def sample(params: Any, rows: Any) -> tuple[jax.Array, jax.Array]:
    index, told = index_and_condition(rows)
    if told is None and config.condition.name == 'label':
      told = index % config.condition.classes
    keys, x_T = noise(config, seed, index)
    x_0, seen = samplers.sample(
      *(p.step, p.schedule, p.model_fn(params, told), keys, cut(x_T)),
      snapshots=snapshots,
    )
    seen = seen.swapaxes(0, 1)
    if not image_size(config):
      return x_0, seen
    return pixels.to_uint8(x_0), pixels.to_uint8(seen)

  return sample


def chain(config: ConfigDict, seed: int, times: Sequence[int]) -> Callable:
  """(params, index (B,)) -> x_t (B, K, ...) at K falling times, from T on."""
  p = reverse_process(config)

  def sample(params: Any, index: jax.Array) -> jax.Array:
    keys, x = noise(config, seed, index)
    kept, before = [x], None
    for first, after in itertools.pairwise(times):
      x, seen = samplers.sample(
        *(p.step, p.schedule, p.model_fn(params), keys, x),
        times=range(first, after, -1),
        before=before,
        snapshots=1,
      )
      before = samplers.Before(seen[0], jnp.full(len(x), after + 1))
      kept.append(x)
    return jnp.stack(kept, axis=1)

  return sample


def bound(config: ConfigDict, seed: int) -> Callable:
  """(params, batch) -> `likelihood.Bound` of the images of a batch."""
  return bound_by(
    functools.partial(likelihood.bound, draws=config.evaluate.draws),
    config,
    seed,
  )


def bound_by(form: Callable, config: ConfigDict, seed: int) -> Callable:
  """The same by a `form` that is called as `likelihood.bound` is."""
  network, table = model(config), schedule(config)
  options = reverse(config, config.sampler.variance)
  fold = jax.vmap(jax.random.fold_in, (None, 0))

  def evaluate(params: Any, batch: dict[str, jax.Array]) -> likelihood.Bound:
    keys = fold(stream(seed, 'evaluate'), batch['index'])
    x0 = pixels.to_float(batch['image'])
    told = conditioning.of_batch(config, batch)
    args = () if told is None else (told,)

    def model_fn(x_t: jax.Array, t: jax.Array) -> Any:
      return network.apply({'params': params}, x_t, t, *args)

    return form(table, model_fn, keys, x0, **options)

  return evaluate


def features(config: ConfigDict) -> Callable:
  """(Inception's parameters, uint8 (B, H, W, 1 or 3)) -> its features."""
  prepare = named(inception, config.evaluate.resize, 'images', 'resize')

  def apply(params: Any, images: jax.Array) -> inception.Features:
    B, H, W, _ = images.shape
    images = jnp.broadcast_to(images, (B, H, W, 3))  # gray is repeated
    return inception.Inception().apply({'params': params}, prepare(images))  # type: ignore[return-value]

  return apply


class Codec(NamedTuple):
  """The two parts of the codec, for functions of the weights `params`."""

  errors: Callable  # (params, batch) -> (S, B); see `diffusion/codec.py`
  run: Callable  # (params, batch, squares, told, sending) -> Passed
  schedule: schedules.Schedule  # of the jumps


def codec(config: ConfigDict, seed: int) -> Codec:
  """The codec of a recipe, for batches with `image` and `index`.

  Raises:
    UserError: for a number that it cannot do with.
  """
  c, network, table = config.codec, model(config), schedule(config)
  if not 1 <= c.log2_candidates <= 24:
    raise errors.UserError(
      f'config.codec.log2_candidates={c.log2_candidates} is not in 1..24'
    )
  if not 0 < c.group_bits <= c.log2_candidates:
    raise errors.UserError(
      f'config.codec.group_bits={c.group_bits} is not above 0 and at most '
      f'config.codec.log2_candidates={c.log2_candidates}'
    )
  predict = reverse(config, config.model.variance)['predict']
  short = call(codec_parts.jumps, c, table)
  rules = codec_parts.Rules(c.log2_candidates, c.group_bits)

  def model_fn(params: Any) -> process.ModelFn:
    return lambda x_t, t: network.apply({'params': params}, x_t, t)  # type: ignore[return-value]

  def squares(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    keys, _ = noise(config, seed, batch['index'])
    x0 = pixels.to_float(batch['image'])
    return codec_parts.errors(
      table, short, model_fn(params), keys, x0, predict=predict
    )

  def run(
    params: Any,
    batch: dict[str, jax.Array],
    squares: jax.Array,
    told: codec_parts.Code,
    sending: jax.Array,
  ) -> codec_parts.Passed:
    _, x_T = noise(config, seed, batch['index'])
    return codec_parts.run(
      *(table, short, model_fn(params), stream(seed, 'codec'), x_T),
      rules=rules,
      squares=squares,
      told=told,
      x0=pixels.to_float(batch['image']),
      sending=sending,
      predict=predict,
    )

  return Codec(squares, run, short)
