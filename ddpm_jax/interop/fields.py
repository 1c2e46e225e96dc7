"""Converts the configuration of diffusers' UNet2DModel and DDPMScheduler to the
keys of a recipe, and back. Fields that have no equivalent here are rejected.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from ddpm_jax import errors
from ddpm_jax import ranges

Fields = Mapping[str, Any]
MOST = 12  # fields named in one message

# Values of fields that are absent, as in files of older versions. None may be
# rejected later.
UNET_DEFAULTS: Fields = {
  'sample_size': None,
  'in_channels': 3,
  'out_channels': 3,
  'time_embedding_dim': None,
  'down_block_types': (
    'DownBlock2D',
    'AttnDownBlock2D',
    'AttnDownBlock2D',
    'AttnDownBlock2D',
  ),
  'up_block_types': (
    'AttnUpBlock2D',
    'AttnUpBlock2D',
    'AttnUpBlock2D',
    'UpBlock2D',
  ),
  'block_out_channels': (224, 448, 672, 896),
  'layers_per_block': 2,
  'downsample_padding': 1,
  'dropout': 0.0,
  'attention_head_dim': 8,
  'norm_num_groups': 32,
  'attn_norm_num_groups': None,
  'num_train_timesteps': None,  # only for a learned time embedding
  '_class_name': 'UNet2DModel',
  'center_input_sample': False,
  'time_embedding_type': 'positional',
  'freq_shift': 0,
  'flip_sin_to_cos': True,
  'mid_block_type': 'UNetMidBlock2D',
  'mid_block_scale_factor': 1,
  'downsample_type': 'conv',
  'upsample_type': 'conv',
  'act_fn': 'silu',
  'norm_eps': 1e-5,
  'resnet_time_scale_shift': 'default',
  'add_attention': True,
  'class_embed_type': None,
  'num_class_embeds': None,
}
# Values that match our U-Net for every recipe.
UNET: Fields = {
  '_class_name': ('UNet2DModel',),
  'center_input_sample': (False,),
  'time_embedding_type': ('positional',),
  'freq_shift': (1,),
  'flip_sin_to_cos': (False,),  # sin first
  'mid_block_type': ('UNetMidBlock2D',),
  'mid_block_scale_factor': (1,),
  'downsample_type': ('conv',),
  'upsample_type': ('conv',),
  'act_fn': ('silu', 'swish'),
  'norm_eps': (1e-6,),
  'resnet_time_scale_shift': ('default',),
  'add_attention': (True,),  # in the middle block
  'class_embed_type': (None,),  # nn.Embedding, or no classes
}
SCHEDULER_DEFAULTS: Fields = {
  '_class_name': 'DDPMScheduler',
  'num_train_timesteps': 1000,
  'beta_start': 1e-4,
  'beta_end': 0.02,
  'beta_schedule': 'linear',
  'variance_type': 'fixed_small',
  'prediction_type': 'epsilon',
  'clip_sample': True,
  'clip_sample_range': 1.0,
  'trained_betas': None,
  'thresholding': False,
  'dynamic_thresholding_ratio': 0.995,  # only for `thresholding`
  'sample_max_value': 1.0,
  'timestep_spacing': 'leading',
  'steps_offset': 0,
  'rescale_betas_zero_snr': False,
  # Fields of versions before 1.0.
  'predict_epsilon': True,
  'tensor_format': 'pt',
  'timestep_values': None,
}
SCHEDULER: Fields = {
  '_class_name': ('DDPMScheduler',),
  'clip_sample_range': (1.0,),
  'trained_betas': (None,),
  'thresholding': (False,),
  # All three are the same if the number of steps is T.
  'timestep_spacing': ('leading', 'linspace', 'trailing'),
  'steps_offset': (0,),
  'rescale_betas_zero_snr': (False, True),
  'predict_epsilon': (True,),
  'timestep_values': (None,),
}
SCHEDULES = {
  'linear': 'linear',
  'scaled_linear': 'scaled_linear',
  'squaredcos_cap_v2': 'cosine',
}
PREDICTIONS = {'epsilon': 'eps', 'sample': 'x0', 'v_prediction': 'v'}
# Without `learned`: the network's output is σ² in diffusers, and log σ² here.
VARIANCES = {
  'fixed_small': 'beta_tilde',
  'fixed_small_log': 'beta_tilde',  # computed from its logarithm
  'fixed_large': 'beta',
  'learned_range': 'learned_range',
}
_TYPES = ranges.Range(
  str, lengths=range(1, 17), like="('DownBlock2D', 'AttnDownBlock2D')"
)
# Types and ranges, which the rest of this module relies on.
KINDS: Mapping[str, ranges.Range] = {
  'sample_size': ranges.KEYS['data.image_size']._replace(
    lengths=(2,), like='32, or (32, 48): sides in pixels'
  ),
  'in_channels': ranges.POSITIVE,
  'block_out_channels': ranges.KEYS['model.channels']._replace(
    lengths=range(1, 17), like='(128, 256): 1 to 16 integers of 4 to 65536'
  ),
  'down_block_types': _TYPES,
  'up_block_types': _TYPES,
  'layers_per_block': ranges.KEYS['model.blocks'],
  'norm_num_groups': ranges.KEYS['model.groups'],
  'dropout': ranges.KEYS['model.dropout'],
  'num_class_embeds': ranges.Range(int, 1, 10**6),
  'num_train_timesteps': ranges.KEYS['schedule.T'],
  'beta_start': ranges.KEYS['schedule.beta_1'],
  'beta_end': ranges.KEYS['schedule.beta_T'],
  'clip_sample': ranges.FLAG,
  'rescale_betas_zero_snr': ranges.FLAG,
}


def to_recipe(unet: Fields, scheduler: Fields) -> dict[str, Any]:
  """Returns keys of a recipe, such as {'model.channels': 128}.

  Raises:
    UserError: If fields have no equivalent; the message names them.
  """
  u = {**UNET_DEFAULTS, **unet}
  s = {**SCHEDULER_DEFAULTS, **scheduler}
  _check_kinds(u, s)
  wrong = [
    *_wrong(unet, u, UNET_DEFAULTS, {**UNET, **_unet_allowed(u, s)}),
    *_wrong(
      *(scheduler, s, SCHEDULER_DEFAULTS),
      {**SCHEDULER, **_scheduler_allowed(s)},
    ),
  ]
  if wrong:
    more = f'; and {len(wrong) - MOST} more' if len(wrong) > MOST else ''
    raise errors.UserError(
      f'this model is not supported: {"; ".join(wrong[:MOST])}{more}'
    )
  channels = u['block_out_channels']
  size = u['sample_size']
  sides = size if isinstance(size, Sequence) else (size, size)
  variance = VARIANCES[s['variance_type']]
  return {
    'data.image_size': size if isinstance(size, int) else tuple(size),
    'data.channels': u['in_channels'],
    'model.name': 'unet',
    'model.predict': PREDICTIONS[s['prediction_type']],
    'model.variance': variance,
    'model.channels': channels[0],
    'model.multipliers': tuple(c // channels[0] for c in channels),
    'model.blocks': u['layers_per_block'],
    'model.attention': tuple(
      min(sides) // 2**level for level in _attended(u['down_block_types'])
    ),
    'model.patch': 1,
    'model.groups': u['norm_num_groups'],
    'model.dropout': float(u['dropout']),
    **_condition(u),
    'schedule.name': SCHEDULES[s['beta_schedule']],
    'schedule.T': s['num_train_timesteps'],
    'schedule.beta_1': float(s['beta_start']),
    # With a single step, diffusers uses β_1 and we use β_T.
    'schedule.beta_T': float(
      s['beta_end'] if s['num_train_timesteps'] > 1 else s['beta_start']
    ),
    'schedule.zero_terminal_snr': s['rescale_betas_zero_snr'],
    'sampler.clip': s['clip_sample'],
    # The loss that trains a learned variance.
    **({'loss.name': 'hybrid'} if variance == 'learned_range' else {}),
  }


def from_recipe(
  keys: Fields, betas: Sequence[float]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the fields of UNet2DModel and of DDPMScheduler.

  Args:
    keys: All keys of a recipe, such as {'model.channels': 128}.
    betas: β_1..β_T, written if diffusers does not have the schedule.

  Raises:
    UserError: If a key has no equivalent; the message names it.
  """
  _check_exportable(keys)
  multipliers = keys['model.multipliers']
  size = keys['data.image_size']
  sides = size if isinstance(size, Sequence) else (size, size)
  attended = [
    min(sides) // 2**level in keys['model.attention']
    for level in range(len(multipliers))
  ]
  channels, variance = keys['data.channels'], keys['sampler.variance']
  unet = {
    **{field: values[0] for field, values in UNET.items()},
    'sample_size': size,
    'in_channels': channels,
    'out_channels': channels * (2 if variance == 'learned_range' else 1),
    'block_out_channels': [keys['model.channels'] * m for m in multipliers],
    'down_block_types': [
      'AttnDownBlock2D' if here else 'DownBlock2D' for here in attended
    ],
    'up_block_types': [
      'AttnUpBlock2D' if here else 'UpBlock2D' for here in reversed(attended)
    ],
    'layers_per_block': keys['model.blocks'],
    'downsample_padding': 0,  # means right and bottom only
    'attention_head_dim': None,  # one head
    'norm_num_groups': keys['model.groups'],
    'attn_norm_num_groups': None,
    'dropout': keys['model.dropout'],
    'num_class_embeds': _class_rows(keys),
  }
  scheduler = {
    '_class_name': 'DDPMScheduler',
    'num_train_timesteps': keys['schedule.T'],
    'beta_start': keys['schedule.beta_1'],
    'beta_end': keys['schedule.beta_T'],
    'variance_type': _back(VARIANCES)[variance],
    'prediction_type': _back(PREDICTIONS)[keys['model.predict']],
    'rescale_betas_zero_snr': keys['schedule.zero_terminal_snr'],
    'clip_sample': keys['sampler.clip'],
    'clip_sample_range': 1.0,
    # Matters with fewer steps than T.
    'timestep_spacing': (
      'leading' if keys['sampler.spacing'] == 'leading' else 'trailing'
    ),
  }
  # Two of our schedules equal others under another name.
  named = _back(SCHEDULES) | {'sqrt_linear': 'linear', 'quad': 'scaled_linear'}
  # With a single step, a named schedule is β_1 in diffusers and β_T here.
  if keys['schedule.name'] in named and keys['schedule.T'] > 1:
    scheduler['beta_schedule'] = named[keys['schedule.name']]
  else:
    scheduler['trained_betas'] = [float(beta) for beta in betas]
  return unet, scheduler


def _condition(u: Fields) -> dict[str, Any]:
  """Keys of `condition`, except `classes`: the last row need not be a class."""
  if u['num_class_embeds'] is None:
    return {'condition.name': ''}
  # Their class embedding is as wide as the time embedding.
  width = 4 * u['block_out_channels'][0]
  return {'condition.name': 'label', 'condition.width': width}


def _class_rows(keys: Fields) -> int | None:
  """Rows of the class embedding; the last is for no class, if trained."""
  if not keys['condition.name']:
    return None
  return keys['condition.classes'] + (keys['condition.drop'] > 0)


def _check_exportable(keys: Fields) -> None:
  for key, known, why in (
    ('model.name', ('unet',), 'diffusers has no such network'),
    (
      'condition.name',
      ('', 'label'),
      'a UNet2DModel takes classes, but has no cross-attention to text, and '
      'UNet2DConditionModel is another network',
    ),
    ('model.patch', (1,), 'a UNet2DModel has no patches'),
    (
      'model.predict',
      PREDICTIONS.values(),
      'a DDPMScheduler has no such prediction_type',
    ),
    (
      'sampler.variance',
      VARIANCES.values(),
      'a DDPMScheduler reads the output of the network as σ², not log σ²',
    ),
    (
      'sampler.spacing',
      ('linear', 'leading'),
      'a DDPMScheduler has no such timestep_spacing',
    ),
  ):
    if keys[key] not in known:
      raise errors.UserError(
        f'config.{key}={keys[key]} cannot be exported: {why}; '
        f'{", ".join(repr(x) for x in dict.fromkeys(known))} can'
      )
  if keys['model.multipliers'][0] != 1:
    raise errors.UserError(
      f'config.model.multipliers={keys["model.multipliers"]} cannot be '
      'exported: they must begin with 1, because a UNet2DModel has one width '
      'for the first level, the first convolution and the time embedding'
    )


def _back(table: Mapping[str, str]) -> dict[str, str]:
  """The inverse mapping, to the first of several equivalent names."""
  return {ours: theirs for theirs, ours in reversed([*table.items()])}


def _attended(types: Sequence[str]) -> list[int]:
  return [i for i, name in enumerate(types) if name.startswith('Attn')]


def _check_kinds(u: Fields, s: Fields) -> None:
  """Raises UserError if a field has a wrong type or is out of range."""
  classes = u['num_class_embeds']
  found = {
    **{field: s[field] if field in s else u[field] for field in KINDS},
    'num_class_embeds': 1 if classes is None else classes,
  }
  try:
    ranges.check_fields(found, KINDS)
  except errors.UserError as e:
    raise errors.UserError(f'this model is not supported: {e}') from None


def _unet_allowed(u: Fields, s: Fields) -> dict[str, Any]:
  """Supported values of U-Net fields that depend on other fields."""
  channels, types = u['block_out_channels'], u['down_block_types']
  levels = len(channels)
  plain = ['AttnDownBlock2D' if 'Attn' in t else 'DownBlock2D' for t in types]
  plain = (plain + ['DownBlock2D'] * levels)[:levels]
  attended = {channels[i] for i in _attended(plain)} | {channels[-1]}
  learned = s['variance_type'] in ('learned', 'learned_range')
  first = channels[0]
  multiples = [max(1, c // first) * first for c in channels]
  return {
    'in_channels': (1, 3),
    'block_out_channels': (multiples,),
    'down_block_types': (plain,),
    'up_block_types': ([t.replace('Down', 'Up') for t in reversed(plain)],),
    'out_channels': (u['in_channels'] * (2 if learned else 1),),
    'time_embedding_dim': (None, 4 * first),
    'attn_norm_num_groups': (None, u['norm_num_groups']),
    'downsample_padding': (0,) if levels > 1 else (u['downsample_padding'],),
    # One head: None, or the number of channels if all attention has the same.
    'attention_head_dim': (None, *(attended if len(attended) == 1 else ())),
  }


def _scheduler_allowed(s: Fields) -> dict[str, Any]:
  """Supported values of scheduler fields that may depend on other fields."""
  return {
    'beta_schedule': tuple(SCHEDULES),
    'variance_type': tuple(VARIANCES),
    'prediction_type': tuple(PREDICTIONS),
    # Unused without clipping.
    'clip_sample_range': (1.0,)
    if s['clip_sample']
    else (s['clip_sample_range'],),
  }


def _wrong(
  given: Fields, whole: Fields, known: Fields, allowed: Fields
) -> list[str]:
  """Describes each unknown field and each unsupported value."""
  lines = []
  for field, value in whole.items():
    if field not in known:
      if not field.startswith('_'):
        shown = f'{errors.short(field)}={errors.short(repr(value))}'
        lines.append(f'{shown} (an unknown field)')
      continue
    value = list(value) if isinstance(value, tuple) else value
    fits = allowed.get(field, [value])
    if not any(
      value == fit and (value is None) == (fit is None) for fit in fits
    ):
      default = '' if field in given else ', its default'
      wanted = ' or '.join(repr(fit) for fit in fits)
      lines.append(
        f'{field}={errors.short(repr(value))}{default} (ours: {wanted:.300})'
      )
  return lines
