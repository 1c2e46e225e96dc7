"""The condition of a recipe: its encoder, where it comes from, its guidance."""

import hashlib
import textwrap
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax import npz
from ddpm_jax import recipe
from ddpm_jax.data import captions
from ddpm_jax.data import store
from ddpm_jax.diffusion import guidance
from ddpm_jax.diffusion import process
from ddpm_jax.interop import minilm
from ddpm_jax.models import condition as encoders
from ddpm_jax.models import layers
from ddpm_jax.runtime import images
from ddpm_jax.runtime import workdir


def check(config: ConfigDict) -> None:
  """Refuses a condition that cannot be learned or drawn.

  Raises:
    UserError: with the reason.
  """
  c, s = config.condition, config.sampler
  if c.name and config.model.name != 'unet':
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
    _check_heads(config)
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


def _check_heads(config: ConfigDict) -> None:
  """Refuses levels that look at a text, but not with whole heads."""
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


def encoder(config: ConfigDict) -> Any:
  """The linen module that reads the condition; None if there is none.

  Raises:
    UserError: if it is of classes, and it is not known how many.
  """
  c = config.condition
  if c.name == 'label':
    if not c.classes:
      raise errors.UserError(
        'config.condition.classes=0 is for training, where the data say how '
        'many there are: set it'
      )
    return encoders.Label(c.classes, c.width)
  if c.name == 'text':
    return encoders.Text(c.length, c.width, c.depth)
  if c.name == 'minilm':
    return encoders.Frozen(c.length, minilm.FEATURES, c.width)
  return None


def wrap(config: ConfigDict, network: nn.Module) -> nn.Module:
  """The network, with the encoder of a condition if it has one."""
  reader = encoder(config)
  return encoders.Conditional(network, reader) if reader else network


def encode(config: ConfigDict, texts: Sequence[str]) -> Any:
  """Texts as arrays with a row each, as the encoder of the recipe takes them.

  Raises:
    UserError: for a text that is too long, or an encoder that is not there.
  """
  c = config.condition
  if c.name == 'text':
    return captions.tokens(texts, c.length)
  # What a frozen encoder says never changes.
  told = repr((c.name, c.length, *texts)).encode()
  cache = workdir.cache()
  if cache is None:
    return minilm.encode(texts, c.length)
  path = cache / f'{hashlib.sha256(told).hexdigest()[:32]}.npz'
  if not path.exists():
    made: Any = minilm.encode(texts, c.length)
    with images.whole(path) as part, part.open('wb') as file:
      np.savez(file, **made)
  return npz.load(path)


def attach(config: ConfigDict, source: store.Source) -> store.Source:
  """A source that gives what the condition needs.

  Raises:
    UserError: if it has no such labels or captions.
  """
  c, data = config.condition, config.data
  if c.name == 'label' and not source.class_names:
    raise errors.UserError(
      f'the data set {data.name} has no classes here, and '
      'config.condition.name=label needs them'
    )
  if c.name == 'label' and c.classes not in (0, len(source.class_names)):
    raise errors.UserError(
      f'the data have {len(source.class_names)} classes: set '
      f'config.condition.classes to that, not {c.classes}, or leave it out'
    )
  if c.name in ('', 'label'):
    return source

  def encoded(texts: list[str]) -> Any:
    return encode(config, texts)

  if data.captions == 'classes':
    names = data.names or source.class_names
    if len(names) != len(source.class_names):
      raise errors.UserError(
        f'config.data.names has {len(names)} names for the '
        f'{len(source.class_names)} classes of the data'
      )
    texts = captions.of_classes(names, tuple(data.templates))
    return captions.attach(source, texts, 'label', encoded)
  if not source.captions:
    raise errors.UserError(
      f'config.condition.name={c.name} needs captions: set '
      'config.data.captions=classes, or file for a folder that has them, or to '
      'a feature of texts of a TFDS set'
    )
  return captions.attach(source, source.captions, 'id', encoded)


def settled(config: ConfigDict, source: store.Source) -> ConfigDict:
  """The recipe with what it leaves to the data; see `recipe.FROM_DATA`."""
  found = {'data.max_value': source.max_value}
  if config.condition.name == 'label':
    found['condition.classes'] = len(source.class_names)
  return _filled(config, found)


def provisional(config: ConfigDict) -> ConfigDict:
  """The recipe with some number of classes, before the data are read."""
  return _filled(config, {'condition.classes': 1})


def _filled(config: ConfigDict, found: dict[str, int]) -> ConfigDict:
  config = config.copy_and_resolve_references()
  flat = recipe.flatten(config)
  config.update_from_flattened_dict(
    {key: value for key, value in found.items() if not flat[key]}
  )
  return config.lock()


def reads_classes(config: ConfigDict) -> bool:
  """Whether the network is told the classes of the data, or texts of them."""
  c, data = config.condition, config.data
  return c.name == 'label' or (bool(c.name) and data.captions == 'classes')


def listed(names: Sequence[str]) -> str:
  """'0 cat, 1 dog, ...', cut to fit a line."""
  if list(names) == [str(i) for i in range(len(names))]:
    return f'0 to {len(names) - 1}'
  every = ', '.join(f'{i} {name}' for i, name in enumerate(names))
  return textwrap.shorten(every, 200, placeholder=' ...')


def of_batch(
  config: ConfigDict, batch: dict[str, Any], keys: jax.Array | None = None
) -> Any:
  """The condition of the examples of a batch; None if the recipe has none.

  Args:
    config: the recipe.
    batch: of a source that `attach` made.
    keys: (B,), which of its captions an example gets, and whether it gets none
      (`condition.drop`); without them it gets the first.
  """
  c = config.condition
  if not c.name:
    return None
  if c.name == 'label':
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
  # Not the bits that chose the caption.
  others = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
  dropped = jax.vmap(lambda k: jax.random.bernoulli(k, c.drop))(others)
  return jax.vmap(
    lambda drop, a, b: jax.tree.map(lambda x, y: jnp.where(drop, x, y), a, b)
  )(dropped, nothing, given)


def of_data(config: ConfigDict, source: store.Source, count: int) -> Any:
  """Texts of `count` examples, one after another; None for other conditions."""
  if config.condition.name in ('', 'label'):
    return None
  batch = source.gather(np.arange(count, dtype=np.int32) % len(source))
  return of_batch(config, {'text': batch['text']})


def class_number(
  config: ConfigDict, name: str, saved: Sequence[str] = ()
) -> int:
  """Of a class by its name, or else by its number.

  Its name is in `config.data.names` or among those `saved` with the run.

  Raises:
    UserError: if there is none.
  """
  classes = config.condition.classes
  for names in (list(config.data.names)[:classes], list(saved)):
    if name in names:
      return names.index(name)
  if not name.isdecimal() or int(name) >= classes:
    known = config.data.names or saved or [str(i) for i in range(classes)]
    raise errors.UserError(
      f'--label={name}: there are {classes} classes, {listed(known)}'
    )
  return int(name)


def class_title(
  config: ConfigDict, number: int, saved: Sequence[str] = ()
) -> str:
  """What to call a class: its name if it is known, or else its number."""
  names = config.data.names or saved
  return names[number] if number < len(names) else str(number)


def model_fn(
  config: ConfigDict, network: nn.Module, params: Any, condition: Any
) -> process.ModelFn:
  """The network told a condition, as strongly as `config.sampler` says.

  The condition is encoded once, not at every step.
  """
  variables = {'params': params}
  s = config.sampler

  def denoise(x_t: jax.Array, t: jax.Array, context: Any) -> Any:
    return network.apply(variables, x_t, t, context, method='denoise')

  def context(condition: Any) -> Any:
    return network.apply(variables, condition, method='encode')

  given = context(condition)
  if s.guidance == 1:
    return lambda x_t, t: denoise(x_t, t, given)
  n = len(jax.tree.leaves(condition)[0])
  return guidance.guided(
    denoise,
    given,
    context(encoder(config).nothing(n)),
    T=config.schedule.T,
    scale=s.guidance,
    interval=tuple(s.guidance_interval),
    rescale=s.guidance_rescale,
  )
