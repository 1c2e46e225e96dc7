"""All checks of a recipe, each with a message that says what to change.

`main` calls `check` once, before anything is built, so jobs need not. Checks
that need the data are in `dataset`, those that need the devices in `build`.
"""

import re
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
from ddpm_jax.storage import boards
from ddpm_jax.storage import logs

# The sections whose `name` is a function: the module it is a member of, what
# messages call it, and the number of its positional arguments.
MEMBERS = {
  'data': (sources, 'data set', 0),
  'schedule': (schedules, 'schedule', 0),
  'model': (networks, 'model', 2),
  'condition': (encoders, 'condition', 0),
  'loss': (losses, 'loss', 4),
  'sampler': (samplers, 'sampler', 5),
}
# Keys of these sections that are read whichever function `name` is.
ALWAYS_READ = {
  'data': (
    *('image_size', 'channels', 'captions', 'names', 'templates', 'flip'),
    'split',  # `dataset.source` checks it, with its own message
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
    UserError: With what is wrong and what to set.
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
  # Building them refuses sizes that do not fit each other.
  build.network(recipe.provisional(config))
  build.sampler(recipe.provisional(config))


def names(config: ConfigDict) -> None:
  """Refuses unknown names."""
  for section, (module, what, _) in MEMBERS.items():
    if name := config[section].name:
      build.member(module, name, what)
  build.member(predictions, config.model.predict, 'prediction')
  build.member(variances, config.model.variance, 'variance')
  build.member(variances, config.sampler.variance, 'variance')
  build.member(spacings, config.sampler.spacing, 'spacing')
  build.member(timesteps, config.loss.t, 'choice of t')


def data(config: ConfigDict) -> None:
  """Refuses options that do not fit images, or do not fit points."""
  if not recipe.image_size(config) and config.data.flip:
    raise errors.UserError(
      'points cannot be mirrored: set config.data.flip=false'
    )
  if recipe.image_size(config) and config.data.channels not in (1, 3):
    raise errors.UserError(
      f'config.data.channels={config.data.channels} is not 1 (gray) or 3 (RGB)'
    )


def condition(config: ConfigDict) -> None:
  """Refuses a condition that cannot be trained or sampled with."""
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
      'config.condition.name=minilm, whose first and last tokens are markers'
    )
  if c.width % 4:
    raise errors.UserError(
      f'config.condition.width={c.width} must be a multiple of 4, the number '
      'of heads'
    )
  if c.name in ('text', 'minilm') and recipe.image_size(config):
    _heads(config)
  if s.guidance != 1 and not c.name:
    raise errors.UserError(
      f'config.sampler.guidance={s.guidance} needs a network with a '
      'condition; set config.sampler.guidance=1'
    )
  if c.name and c.drop == 0 and s.guidance != 1:
    raise errors.UserError(
      f'config.sampler.guidance={s.guidance} needs a network that was trained '
      'without the condition too, and config.condition.drop=0 never drops it: '
      'set config.sampler.guidance=1, or train with config.condition.drop=0.1'
    )
  low, high = s.guidance_interval
  if low > high:
    raise errors.UserError(
      f'config.sampler.guidance_interval={(low, high)} must be (low, high), '
      'with low <= high'
    )


def _heads(config: ConfigDict) -> None:
  """Refuses channels that the heads of cross-attention do not divide."""
  model, heads = config.model, layers.CrossAttention.heads
  side, last = min(recipe.image_size(config)), len(model.multipliers) - 1
  for level, multiplier in enumerate(model.multipliers):
    attends = side // model.patch // 2**level in model.attention
    channels = model.channels * multiplier
    if channels % heads and (attends or level == last):
      raise errors.UserError(
        f'level {level} has {channels} channels (config.model.channels='
        f'{model.channels} times {multiplier} of config.model.multipliers), '
        f'which must be a multiple of {heads}, the heads that attend to a text'
      )


def schedule(config: ConfigDict) -> bool:
  """Refuses a prediction that does not fit the schedule.

  Returns:
    Whether the schedule has a zero terminal SNR.
  """
  c = config.schedule
  ends_in_noise = schedules.ends_in_noise(build.schedule(config))
  if ends_in_noise and config.model.predict == 'eps':
    key = 'zero_terminal_snr' if c.zero_terminal_snr else f'name={c.name}'
    raise errors.UserError(
      f'config.schedule.{key} leaves nothing of x_0 in x_T, so x_0 cannot be '
      'computed from ε there: set config.model.predict to v or x0'
    )
  return ends_in_noise


def variance(config: ConfigDict) -> None:
  """Refuses to sample with a variance that does not fit the network."""
  trained, sampled = config.model.variance, config.sampler.variance
  learned = variances.is_learned(trained) or variances.is_learned(sampled)
  if sampled != trained and learned:
    raise errors.UserError(
      f'config.sampler.variance={sampled} does not fit the network, which has '
      f'config.model.variance={trained}'
    )


def loss(config: ConfigDict, *, ends_in_noise: bool) -> None:
  """Refuses a loss that does not train the whole model.

  Args:
    config: The recipe.
    ends_in_noise: Whether its schedule has a zero terminal SNR.
  """
  name, model = config.loss.name, config.model
  learns = variances.is_learned(model.variance)
  if learns and name in losses.__all__ and name not in ('vlb', 'hybrid'):
    raise errors.UserError(
      f'config.loss.name={name} does not depend on the variance, so '
      f'config.model.variance={model.variance} would not be learned; use vlb '
      'or hybrid, or a fixed variance'
    )
  if not learns and name == 'hybrid':
    raise errors.UserError(
      'config.loss.name=hybrid is for a learned variance; set '
      'config.model.variance=learned_range'
    )
  if name == 'min_snr' and ends_in_noise:
    raise errors.UserError(
      'config.loss.name=min_snr weights t by its SNR, which is 0 at t = T in '
      'this schedule, where sampling begins: that step would not be learned. '
      'Use simple, or a schedule without a zero terminal SNR'
    )
  if name == 'min_snr' and model.predict == 'mu':
    raise errors.UserError(
      'config.loss.name=min_snr weights the error of x_0, which cannot be '
      'computed from μ̃ at large t; set config.model.predict to eps, x0 or v'
    )


def sampler(config: ConfigDict, *, ends_in_noise: bool) -> None:
  """Refuses sampler steps that do not fit the model.

  Args:
    config: The recipe.
    ends_in_noise: Whether its schedule has a zero terminal SNR.
  """
  c, T = config.sampler, config.schedule.T
  if ends_in_noise and c.spacing in ('leading', 'quad') and c.steps < T:
    raise errors.UserError(
      f'config.sampler.spacing={c.spacing} does not begin at T, which a '
      'schedule with an SNR of 0 at T needs; set linear or quadratic'
    )
  # Both are learned for steps from t to t - 1, and do not fit longer ones.
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
  """Refuses groups of more bits than the index of a candidate has."""
  c = config.codec
  if c.group_bits > c.log2_candidates:
    raise errors.UserError(
      f'config.codec.group_bits={c.group_bits} must be at most '
      f'config.codec.log2_candidates={c.log2_candidates}'
    )


def devices(config: ConfigDict) -> None:
  """Refuses an unknown engine, and options that exclude each other."""
  wanted = config.parallel
  if wanted.engine not in engines.ENGINES:
    raise errors.unknown('engine', wanted.engine, engines.ENGINES)
  if wanted.engine == 'pmap' and wanted.fsdp > 1:
    raise errors.UserError(
      'pmap cannot split the state over devices: set parallel.fsdp=1, or '
      'parallel.engine=jit'
    )
  if wanted.spatial > 1:
    _spatial(config)


def _spatial(config: ConfigDict) -> None:
  """Refuses images whose rows cannot be split over that many devices."""
  n = config.parallel.spatial
  if config.parallel.engine == 'pmap':
    raise errors.UserError(
      'pmap cannot split an image over devices: set parallel.spatial=1, or '
      'parallel.engine=jit'
    )
  if not recipe.image_size(config):
    raise errors.UserError('points have no rows: set parallel.spatial=1')
  rows, levels = recipe.image_size(config)[0], len(config.model.multipliers)
  least = rows // config.model.patch // 2 ** (levels - 1)
  if least % n:
    raise errors.UserError(
      f'config.parallel.spatial={n} must divide the {least} row(s) of the '
      f'smallest of {levels} levels ({rows} rows in an image)'
    )


def wandb(config: ConfigDict) -> None:
  """Refuses a project of W&B that cannot be logged to, in training only.

  A run that was trained with W&B is sampled where it is not installed.
  """
  project = config.log.wandb
  if not project:
    return
  if not re.fullmatch(r'[^/\\#?%:\x00-\x1f]{1,128}', project):
    raise errors.UserError(
      f'config.log.wandb={errors.short(project)!r} is not the name of a W&B '
      'project: at most 128 characters, without / \\ # ? % : (WANDB_ENTITY '
      'names the team)'
    )
  errors.find_optional(
    'wandb',
    what=f'config.log.wandb={project}',
    install=f"{boards.WANDB_INSTALL}, or set --config.log.wandb=''",
  )


def unread(
  config: ConfigDict, said: Collection[str], changes: Collection[str] = ()
) -> None:
  """Refuses keys that were set but are not read by the chosen function.

  Args:
    config: The recipe.
    said: The keys that the user sets now. Other keys, which come from a saved
      recipe, are not checked.
    changes: Those of them that are set on the command line. If they choose
      another function, the keys of its section in the file are not checked:
      they were set for the function in the file.

  Raises:
    UserError: With the first such key that is not at its default.
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
        reset = f'set config.{full}={default[full]}'
        raise errors.UserError(
          f'config.{full}={keys[key]} is not used by config.{section}.name='
          f'{name or repr(name)}: '
          f'{"leave it out" if full in changes else reset}'
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
  """Returns a saved recipe, with `parallel` changed to fit this machine.

  A run may have begun on other devices. If its recipe fits those here, it is
  returned as it is.

  Args:
    config: The recipe of the run; not changed.
    trains: Whether the devices must divide `batch_size`. If all of them do not,
      the largest number that does is used.
  """

  def share(parts: int) -> bool:
    return not trains or config.batch_size % (parts * config.accumulate) == 0

  try:
    devices(config)
    if share(meshes.num_shards(build.mesh(config))):
      return config
  except errors.UserError:
    pass  # It does not fit these devices.
  here, was = len(jax.devices()), config.parallel
  several = jax.process_count() > 1  # They must use all devices.
  used = max((n for n in range(1, here + 1) if share(n)), default=0)
  if not used or (several and used < here):
    return config  # Training refuses it.
  logs.say(
    f'the devices of this run (config.parallel.data={was.data}, fsdp='
    f'{was.fsdp}, spatial={was.spatial}) do not fit here: using {used} of '
    f'{here} device(s)'
  )
  fitted = config.copy_and_resolve_references()
  fitted.parallel.update(data=-1 if used == here else used, fsdp=1, spatial=1)
  return fitted.lock()
