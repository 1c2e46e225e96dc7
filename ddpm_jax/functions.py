"""From a recipe to the pure functions that the jobs compile."""

import functools
import inspect
import itertools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import checks
from ddpm_jax import conditioning
from ddpm_jax import errors
from ddpm_jax import recipe
from ddpm_jax import registry
from ddpm_jax.diffusion import codec as codec_parts
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import objectives
from ddpm_jax.diffusion import pixels
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import spacings
from ddpm_jax.diffusion import timesteps
from ddpm_jax.diffusion import training
from ddpm_jax.metrics import inception


def init_state(config: ConfigDict) -> training.TrainState:
  """The state at step 0. Call it under jit."""
  network = build.model(config)
  x = jnp.zeros((1, *recipe.shape(config)))
  t = jnp.ones(1, jnp.int32)
  params = network.init(build.stream(config.seed, 'init'), x, t)['params']
  return begin(config, params)


def begin(config: ConfigDict, params: Any) -> training.TrainState:
  """The state at step 0 with these weights. Call it under jit."""
  by_history = config.loss.t == 'importance'
  return training.TrainState.create(
    apply_fn=build.model(config).apply,
    params=params,
    # A copy: a donated state must not hold one buffer twice.
    ema_params=jax.tree.map(jnp.copy, params),
    tx=build.optimizer(config),
    history=timesteps.no_history(config.schedule.T) if by_history else None,
  )


def loss_fn(config: ConfigDict) -> Callable[..., tuple[jax.Array, Any]]:
  """Algorithm 1 for a batch of images, as `training.train_step` wants it.

  The randomness of an example follows from `key` and its `batch['index']`.
  """
  network, table = build.model(config), build.schedule(config)
  objective = registry.named(objectives, config.loss.name, 'model_fn', 'loss')
  options = build.reverse(config, config.model.variance)
  checks.loss(config, ends_in_noise=schedules.ends_in_noise(table))
  draw_t = registry.named(timesteps, config.loss.t, 'key', 'choice of t')
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
    key=build.stream(config.seed, 'train'),
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
  c, network = config.sampler, build.model(config)
  step = registry.named(samplers, c.name, 'x_t', 'sampler')
  table = build.schedule(config)
  spacing = registry.named(spacings, c.spacing, 'steps', 'spacing')
  strided = {'steps': c.steps, 'spacing': spacing}
  short = registry.call(schedules.stride, strided, table, of='sampler')
  names = inspect.signature(step).parameters
  options = {**c, **build.reverse(config, c.variance)}
  options = {k: v for k, v in options.items() if k in names}
  ends_in_noise = schedules.ends_in_noise(table)
  checks.sampler(config, names, ends_in_noise=ends_in_noise)

  def model_fn(params: Any, condition: Any = None) -> process.ModelFn:
    if condition is not None:
      return conditioning.model_fn(config, network, params, condition)
    return lambda x_t, t: network.apply({'params': params}, x_t, t)  # type: ignore[return-value]

  return Reverse(functools.partial(step, **options), short, model_fn)


def noise(config: ConfigDict, seed: int, index: jax.Array) -> Any:
  """(keys, x_T) of the samples `index` of a seed."""
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  keys = fold(build.stream(seed, 'sample'), index)
  # Steps fold in their t ≥ 1, so 0 is left for x_T.
  first = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
  return keys, process.normal(first, recipe.shape(config))


def index_and_condition(rows: Any) -> tuple[jax.Array, Any]:
  """What `sampler` takes, of either form; the condition may be None."""
  if isinstance(rows, dict):
    return rows['index'], rows.get('condition')
  return rows, None


class Drawn(NamedTuple):
  """B examples that were drawn."""

  images: jax.Array  # uint8 (B, H, W, C); or points, float32
  x0_hats: jax.Array | None  # (B, K, ...), the same of predictions on the way
  bad_t: jax.Array  # (B,), see `samplers.Sampled`


def drawn(config: ConfigDict, sampled: samplers.Sampled) -> Drawn:
  """What was sampled, as it is shown and written."""
  x_0, x0_hats = sampled.x_0, sampled.x0_hats.swapaxes(0, 1)
  if recipe.image_size(config):
    x_0, x0_hats = pixels.to_uint8(x_0), pixels.to_uint8(x0_hats)
  return Drawn(x_0, x0_hats, sampled.bad_t)


def sampler(
  config: ConfigDict,
  seed: int,
  snapshots: int = 0,
  cut: Callable[[jax.Array], jax.Array] = lambda images: images,
) -> Callable:
  """(params, rows) -> `Drawn`.

  `rows` holds `index` (B,) and, if the recipe
  has one, a `condition`; or it is the index alone, and then the classes take
  turns, or nothing is asked for. Image `index` of a seed is the same in a batch
  of any size. `cut` may spread images over devices.
  """
  p = reverse_process(config)

  def sample(params: Any, rows: Any) -> Drawn:
    index, told = index_and_condition(rows)
    if told is None and config.condition.name == 'label':
      told = index % config.condition.classes
    keys, x_T = noise(config, seed, index)
    sampled = samplers.sample(
      *(p.step, p.schedule, p.model_fn(params, told), keys, cut(x_T)),
      snapshots=snapshots,
    )
    return drawn(config, sampled)

  return sample


def chain(config: ConfigDict, seed: int, times: Sequence[int]) -> Callable:
  """(params, index (B,)) -> `Drawn` of x_t (B, K, ...), not rounded.

  At K falling times of the sampler's schedule, from the last one on.
  """
  p = reverse_process(config)

  def sample(params: Any, index: jax.Array) -> Drawn:
    keys, x = noise(config, seed, index)
    kept, before, bad_t = [x], None, jnp.zeros(len(x), jnp.int32)
    for first, after in itertools.pairwise(times):
      x, seen, bad = samplers.sample(
        *(p.step, p.schedule, p.model_fn(params), keys, x),
        times=range(first, after, -1),
        before=before,
        snapshots=1,
      )
      before = samplers.Before(seen[0], jnp.full(len(x), after + 1))
      kept.append(x)
      bad_t = jnp.where(bad_t > 0, bad_t, bad)
    return Drawn(jnp.stack(kept, axis=1), None, bad_t)

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
  network, table = build.model(config), build.schedule(config)
  options = build.reverse(config, config.sampler.variance)
  fold = jax.vmap(jax.random.fold_in, (None, 0))

  def evaluate(params: Any, batch: dict[str, jax.Array]) -> likelihood.Bound:
    keys = fold(build.stream(seed, 'evaluate'), batch['index'])
    x0 = pixels.to_float(batch['image'])
    told = conditioning.of_batch(config, batch)
    args = () if told is None else (told,)

    def model_fn(x_t: jax.Array, t: jax.Array) -> Any:
      return network.apply({'params': params}, x_t, t, *args)

    return form(table, model_fn, keys, x0, **options)

  return evaluate


def features(config: ConfigDict) -> Callable:
  """(Inception's parameters, uint8 (B, H, W, 1 or 3)) -> its features."""
  prepare = registry.named(
    inception, config.evaluate.resize, 'images', 'resize'
  )

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
  c, network, table = config.codec, build.model(config), build.schedule(config)
  if c.group_bits > c.log2_candidates:
    raise errors.UserError(
      f'config.codec.group_bits={c.group_bits} must be at most '
      f'config.codec.log2_candidates={c.log2_candidates}'
    )
  predict = build.reverse(config, config.model.variance)['predict']
  short = registry.call(codec_parts.jumps, c, table, of='codec')
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
      *(table, short, model_fn(params), build.stream(seed, 'codec'), x_T),
      rules=rules,
      squares=squares,
      told=told,
      x0=pixels.to_float(batch['image']),
      sending=sending,
      predict=predict,
    )

  return Codec(squares, run, short)
