"""Every refusal of a recipe, each with its reason.

`main` calls `check` once, before anything is built; jobs need not. What depends
on the data is refused by `dataset`, and on the devices by `build`.
"""

from collections.abc import Callable
from collections.abc import Collection

import jax
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import ranges
from ddpm_jax import recipe
from ddpm_jax.data import sources
from ddpm_jax.diffusion import losses
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import spacings
from ddpm_jax.diffusion import timesteps
from ddpm_jax.diffusion import variances
from ddpm_jax.interop import minilm
from ddpm_jax.models import condition as encoders
from ddpm_jax.models import layers
from ddpm_jax.models import networks
from ddpm_jax.parallel import engines
from ddpm_jax.parallel import meshes
from ddpm_jax.storage import logs

# The sections whose `name` is a function: what it is a member of, what to call
# it, and how many positional arguments it is called with.
MEMBERS = {
  'data': (sources, 'data set', 0),
  'schedule': (schedules, 'schedule', 0),
  'model': (networks, 'model', 2),
  'condition': (encoders, 'condition', 0),
  'loss': (losses, 'loss', 4),
  'sampler': (samplers, 'sampler', 5),
}
# Keys of these sections that are read whatever function the name stands for.
ALWAYS_READ = {
  'data': (
    *('image_size', 'channels', 'captions', 'names', 'templates', 'flip'),
    'split',  # is refused by `dataset.source`, with a line of its own
  ),
  'schedule': ('zero_terminal_snr', 'T'),
  'model': ('predict', 'variance'),
  'condition': ('drop', 'classes'),
  'loss': ('t',),
  'sampler': (
    *('steps', 'spacing', 'clip', 'weights', 'batch_size'),
    *('guidance', 'guidance_interval', 'guidance_rescale'),
  ),
}


def check(config: ConfigDict) -> None:
  """Refuses a recipe that cannot work.

  Raises:
    UserError: with what is wrong and what to set.
  """
  ranges.check(recipe.flatten(config))
  names(config)
  data(config)
  condition(config)
  ends_in_noise = schedule(config)
  variance(config)
  loss(config, ends_in_noise=ends_in_noise)
  sampler(config, ends_in_noise=ends_in_noise)
  codec(config)
  devices(config)
  # Building, below, refuses sizes that do not fit each other.
  build.network(recipe.provisional(config))
  build.sampler(recipe.provisional(config))


def names(config: ConfigDict) -> None:
  """Refuses names that stand for nothing."""
  for section, (module, what, _) in MEMBERS.items():
    if name := config[section].name:
      build.member(module, name, what)
  build.member(predictions, config.model.predict, 'prediction')
  build.member(variances, config.model.variance, 'variance')
  build.member(variances, config.sampler.variance, 'variance')
  build.member(spacings, config.sampler.spacing, 'spacing')
  build.member(timesteps, config.loss.t, 'choice of t')


def data(config: ConfigDict) -> None:
  """Refuses what images or points cannot be."""
  if not recipe.image_size(config) and config.data.flip:
    raise errors.UserError(
      'points have no left and right to mirror: set config.data.flip=false'
    )
  if recipe.image_size(config) and config.data.channels not in (1, 3):
    raise errors.UserError(
      f'config.data.channels={config.data.channels} is not 1 (gray) or 3 (RGB)'
    )


def condition(config: ConfigDict) -> None:
  """Refuses a condition that cannot be learned or sampled with."""
  c, s = config.condition, config.sampler
  if c.name and config.model.name == 'mlp':
    raise errors.UserError(
      f'config.model.name={config.model.name} takes no condition; unet does'
    )
  if c.classes < 0:
    raise errors.UserError(
      f'config.condition.classes={c.classes} must be at least 0'
    )
  if c.name == 'minilm' and not 3 <= c.length <= minilm.LONGEST:
    raise errors.UserError(
      f'config.condition.length={c.length} must be in 3..{minilm.LONGEST} for '
      'config.condition.name=minilm, two of which say where a text begins and '
      'ends'
    )
  if c.width % 4:
    raise errors.UserError(
      f'config.condition.width={c.width} must be a multiple of 4, its heads'
    )
  if c.name in ('text', 'minilm') and recipe.image_size(config):
    _heads(config)
  if s.guidance != 1 and not c.name:
    raise errors.UserError(
      f'config.sampler.guidance={s.guidance} is for a network with a '
      'condition; 1 is the condition as it is'
    )
  if c.name and c.drop == 0 and s.guidance != 1:
    raise errors.UserError(
      f'config.sampler.guidance={s.guidance} needs the network without a '
      'condition, which config.condition.drop=0 does not train: set '
      'config.sampler.guidance=1, or train with config.condition.drop=0.1'
    )
  low, high = s.guidance_interval
  if low > high:
    raise errors.UserError(
      f'config.sampler.guidance_interval={(low, high)} is not (low, high)'
    )


def _heads(config: ConfigDict) -> None:
  """Refuses levels that attend to a text, but not with whole heads."""
  model, heads = config.model, layers.CrossAttention.heads
  side, last = min(recipe.image_size(config)), len(model.multipliers) - 1
  for level, multiplier in enumerate(model.multipliers):
    attends = side // model.patch // 2**level in model.attention
    channels = model.channels * multiplier
    if channels % heads and (attends or level == last):
      raise errors.UserError(
        f'level {level} has {channels} channels (config.model.channels='
        f'{model.channels} times {multiplier} of config.model.multipliers), '
        f'which must be a multiple of {heads}, its heads for a text'
      )


def schedule(config: ConfigDict) -> bool:
  """Refuses a schedule that the prediction does not fit.

  Returns:
    Whether it has a zero terminal SNR.
  """
  c = config.schedule
  ends_in_noise = schedules.ends_in_noise(build.schedule(config))
  if ends_in_noise and config.model.predict == 'eps':
    key = 'zero_terminal_snr' if c.zero_terminal_snr else f'name={c.name}'
    raise errors.UserError(
      f'config.schedule.{key} leaves nothing of x_0 in x_T, so that ε does not '
      'tell x_0 there: set config.model.predict to v or x0'
    )
  return ends_in_noise


def variance(config: ConfigDict) -> None:
  """Refuses to sample with a variance that the network was not made for."""
  trained, sampled = config.model.variance, config.sampler.variance
  learned = variances.is_learned(trained) or variances.is_learned(sampled)
  if sampled != trained and learned:
    raise errors.UserError(
      f'config.sampler.variance={sampled} does not fit the network, whose '
      f'config.model.variance is {trained}'
    )


def loss(config: ConfigDict, *, ends_in_noise: bool) -> None:
  """Refuses combinations that cannot learn what they should.

  Args:
    config: the recipe.
    ends_in_noise: whether its schedule has a zero terminal SNR.
  """
  name, model = config.loss.name, config.model
  learns = variances.is_learned(model.variance)
  if learns and name in losses.__all__ and name not in ('vlb', 'hybrid'):
    raise errors.UserError(
      f'config.loss.name={name} does not look at the variance, so that '
      f'config.model.variance={model.variance} would not be learned; take vlb '
      'or hybrid, or a fixed variance'
    )
  if not learns and name == 'hybrid':
    raise errors.UserError(
      'config.loss.name=hybrid is for a learned variance; set '
      'config.model.variance=learned_range'
    )
  if name == 'min_snr' and ends_in_noise:
    raise errors.UserError(
      'config.loss.name=min_snr weighs t by its SNR, which this schedule makes '
      '0 at t = T, where sampling begins: that step would not be learned. Take '
      'simple, or a schedule without a zero terminal SNR'
    )
  if name == 'min_snr' and model.predict == 'mu':
    raise errors.UserError(
      'config.loss.name=min_snr weighs the error of x_0, which μ̃ does not tell '
      'at large t; set config.model.predict to eps, x0 or v'
    )


def sampler(config: ConfigDict, *, ends_in_noise: bool) -> None:
  """Refuses steps that the model was not trained for.

  Args:
    config: the recipe.
    ends_in_noise: whether its schedule has a zero terminal SNR.
  """
  c, T = config.sampler, config.schedule.T
  if ends_in_noise and c.spacing in ('leading', 'quad') and c.steps < T:
    raise errors.UserError(
      f'config.sampler.spacing={c.spacing} does not begin at T, where this '
      'schedule has an SNR of 0; set linear or quadratic'
    )
  # Both are of one step of T, and say nothing of a longer one.
  of_a_step = {
    'model.predict': config.model.predict == 'mu',
    'sampler.variance': c.variance == 'learned' and c.name == 'ancestral',
  }
  for key, wrong in of_a_step.items():
    if wrong and c.steps < T:
      raise errors.UserError(
        f'config.{key}={recipe.flatten(config)[key]} is learned for the step '
        f'from t to t - 1, not for jumps: set config.sampler.steps={T}'
      )


def codec(config: ConfigDict) -> None:
  """Refuses groups of dimensions that the codec cannot send."""
  c = config.codec
  if c.group_bits > c.log2_candidates:
    raise errors.UserError(
      f'config.codec.group_bits={c.group_bits} must be at most '
      f'config.codec.log2_candidates={c.log2_candidates}'
    )


def devices(config: ConfigDict) -> None:
  """Refuses an engine, or ways to use devices, that do not go together."""
  wanted = config.parallel
  if wanted.engine not in engines.ENGINES:
    raise errors.unknown('engine', wanted.engine, engines.ENGINES)
  if wanted.engine == 'pmap' and wanted.fsdp > 1:
    raise errors.UserError(
      'pmap keeps the whole state on every device: set parallel.fsdp=1, or '
      'parallel.engine=jit'
    )
  if wanted.spatial > 1:
    _spatial(config)


def _spatial(config: ConfigDict) -> None:
  """Refuses images whose rows cannot be cut so often."""
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


def unread(
  config: ConfigDict, said: Collection[str], changes: Collection[str] = ()
) -> None:
  """Refuses keys that were set and that the chosen function does not read.

  Args:
    config: the recipe.
    said: the keys that the user sets now. A run that was saved with others is
      not refused for them.
    changes: those of them that are on the command line. Where a name is among
      them, what the file sets for the function that it names is left over, and
      not refused.

  Raises:
    UserError: naming the first such key that is not at its default.
  """
  default = recipe.defaults()
  default['sampler.variance'] = config.model.variance
  for section, (module, what, given) in MEMBERS.items():
    keys, name = config[section], config[section].name
    function = build.member(module, name, what) if name else None
    other = f'{section}.name' in changes
    for key in keys:
      full = f'{section}.{key}'
      left_over = other and full not in changes
      if full not in said or full not in default or key == 'name' or left_over:
        continue
      unused = not _reads(section, function, key, given)
      if keys[key] != default[full] and unused:
        mend = f'set config.{full}={default[full]}'
        raise errors.UserError(
          f'config.{full}={keys[key]} is not used by config.{section}.name='
          f'{name or repr(name)}: '
          f'{"leave it out" if full in changes else mend}'
        )


def _reads(
  section: str, function: Callable | None, key: str, given: int
) -> bool:
  if key in ALWAYS_READ[section]:
    return True
  if (section, key) == ('sampler', 'variance'):
    return function is samplers.ancestral or not _is_ours(function)
  return function is not None and build.reads(function, key, given)


def _is_ours(function: Callable | None) -> bool:
  return getattr(function, '__module__', '').startswith('ddpm_jax.')


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
    devices(config)
    if share(meshes.num_shards(build.mesh(config))):
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
  return fitted.lock()
