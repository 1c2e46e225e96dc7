"""From a recipe to objects: the only place where names become functions."""

import importlib
import logging
import pkgutil
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
from ddpm_jax.data import sources
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import variances
from ddpm_jax.runtime import parallel


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
  network = registry.call(
    known[name].build, config.model, recipe.image_size(config), channels
  )
  return conditioning.wrap(config, network)


def schedule(config: ConfigDict) -> schedules.Schedule:
  """The schedule of all T steps.

  Raises:
    UserError: if there is none of the name, or the prediction does not fit it.
  """
  function = registry.named(schedules, config.schedule.name, 'T', 'schedule')
  table = registry.call(function, config.schedule)
  if not config.schedule.zero_terminal_snr:
    return table
  if config.model.predict == 'eps':
    raise errors.UserError(
      'config.schedule.zero_terminal_snr leaves nothing of x_0 in x_T, so that '
      'ε does not tell x_0 there: set config.model.predict to v or x0'
    )
  return registry.call(schedules.zero_terminal_snr, {}, table)


def source(config: ConfigDict, split: str = '') -> Any:
  """The data set, or another split of it; see `data/sources.py`."""
  function = registry.named(sources, config.data.name, None, 'data set')
  data = dict(config.data) | {'image_size': recipe.image_size(config)}
  made = registry.call(function, data | ({'split': split} if split else {}))
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
    checks.spatial(config)
  return parallel.make_mesh(
    *(wanted.data, wanted.fsdp, wanted.spatial), local=local, devices=devices
  )


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
