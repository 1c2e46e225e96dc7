"""What is refused before anything is built: recipes that cannot work."""

from collections.abc import Container

from ml_collections import ConfigDict

from ddpm_jax import conditioning
from ddpm_jax import errors
from ddpm_jax import recipe
from ddpm_jax import registry
from ddpm_jax.data import sources
from ddpm_jax.diffusion import variances

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


def basics(config: ConfigDict) -> None:
  """Refuses what would only come to light after seconds or hours.

  Raises:
    UserError: for a number that must be positive, unknown weights or data, or
      channels that are neither gray nor RGB.
  """
  flat = recipe.flatten(config)
  for key in POSITIVE:
    if flat[key] < 1:
      raise errors.UserError(f'config.{key}={flat[key]} must be at least 1')
  for key, other in (('sampler', ()), ('evaluate', ('',))):
    weights = config[key].weights
    if weights not in ('ema', 'raw', *other):
      raise errors.unknown(f'config.{key}.weights', weights, ('ema', 'raw'))
  registry.named(sources, config.data.name, None, 'data set')
  conditioning.check(config)
  if not recipe.image_size(config) and config.data.flip:
    raise errors.UserError(
      'points have no left and right to mirror: set config.data.flip=false'
    )
  if recipe.image_size(config) and config.data.channels not in (1, 3):
    raise errors.UserError(
      f'config.data.channels={config.data.channels} is not 1 (gray) or 3 (RGB)'
    )


def loss(config: ConfigDict) -> None:
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


def spatial(config: ConfigDict) -> None:
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
  if not recipe.image_size(config):
    raise errors.UserError('points have no rows: set parallel.spatial=1')
  rows, levels = recipe.image_size(config)[0], len(config.model.multipliers)
  least = rows // config.model.patch // 2 ** (levels - 1)
  if least % n:
    raise errors.UserError(
      f'config.parallel.spatial={n} does not divide the {least} row(s) that '
      f'{rows} have become at the smallest of {levels} levels'
    )


def sampler(config: ConfigDict, options: Container[str]) -> None:
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
