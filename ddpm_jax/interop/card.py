"""The model card of an exported run: README.md of its diffusers folder.

The front matter is that of the Hugging Face Hub; the rest is made from the
workdir. No path of this machine goes into it.
"""

import json
import logging
import pathlib
import re
import shlex
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

from ddpm_jax import errors
from ddpm_jax import jsonfile
from ddpm_jax.storage import workdir as workdirs

NAME = 'README.md'
SAMPLES = 'samples.png'
UNKNOWN = 'unknown'  # a license, to the Hub
# Keys of a recipe that say nothing about the model, or only where its data are.
LEFT_OUT = (
  *('parallel', 'checkpoint', 'log', 'evaluate', 'edit', 'codec'),
  'data.path',
)
# Classes whose names are listed.
MOST = 100

Keys = Mapping[str, Any]
Entry = Mapping[str, Any]


class Model(NamedTuple):
  """An exported model.

  Attributes:
    name: USER/NAME on the Hub, or the name of a folder.
    keys: The recipe, flattened.
    step: Step of the weights.
    weights: 'EMA' or 'raw'.
    parameters: Number of them.
    license: Identifier of the Hub, such as 'mit'.
  """

  name: str
  keys: Keys
  step: int
  weights: str
  parameters: int
  license: str = UNKNOWN


class Scores(NamedTuple):
  """Entries of evaluation.json (the first two) and score.json."""

  bounds: Sequence[Entry] = ()
  of_samples: Sequence[Entry] = ()
  small_data: Sequence[Entry] = ()


def license_id(text: str) -> str:
  """Returns the identifier of a license, as the Hub writes it.

  Raises:
    UserError: It cannot be one.
  """
  if not re.fullmatch(r'[a-z0-9]+(?:[.-][a-z0-9]+)*', text):
    raise errors.UserError(
      f'{errors.short(text)!r} is not an identifier of a license, such as mit, '
      'apache-2.0 or cc-by-4.0'
    )
  return text


def write(
  folder: pathlib.Path,
  model: Model,
  run: pathlib.Path,
  defaults: Keys,
  scores: Scores,
) -> None:
  """Writes README.md, and copies samples.png if the run has one.

  Args:
    folder: Where to write, which exists.
    model: The model.
    run: Workdir of the run.
    defaults: The flattened base recipe.
    scores: What was measured of the run.
  """
  if (run / SAMPLES).exists():
    (folder / SAMPLES).write_bytes((run / SAMPLES).read_bytes())
  text = '\n'.join(
    [
      *front_matter(model),
      *_summary(model, has_samples=(folder / SAMPLES).exists()),
      *_use(model),
      *_training(model, run, defaults),
      *_scores(scores),
      *_license(model),
    ]
  )
  (folder / NAME).write_text(text, encoding='utf-8')


def front_matter(model: Model) -> list[str]:
  """Returns the lines of YAML that the Hub reads."""
  keys = model.keys
  note = '  # to fill in' if model.license == UNKNOWN else ''
  lines = [
    '---',
    f'license: {model.license}{note}',
    'library_name: diffusers',
    'pipeline_tag: unconditional-image-generation',
    'tags:',
    *('- ddpm', '- diffusion', '- ddpm_jax'),
  ]
  dataset = keys['data.tfds'].partition('/')[0].partition(':')[0]
  if keys['data.name'] == 'tfds' and re.fullmatch(r'[\w.-]+', dataset):
    lines += ['datasets:', f'- {json.dumps(dataset)}']
  return [*lines, '---', '']


def _summary(model: Model, *, has_samples: bool) -> list[str]:
  keys, title = model.keys, model.name.rpartition('/')[2]
  height, width, channels = _shape(keys)
  kind = 'A class-conditional' if keys['condition.name'] else 'An unconditional'
  color = 'RGB' if channels == 3 else 'gray'
  lines = [
    f'# {_plain(title)}',
    '',
    f'{kind} denoising diffusion probabilistic model (DDPM, [Ho et al. '
    f'2020](https://arxiv.org/abs/2006.11239)) of {height} × {width} {color} '
    f'images, with {model.parameters:,} parameters. It was trained with '
    'ddpm_jax, in JAX, and is in the format of diffusers.',
    '',
  ]
  if has_samples:
    lines += [
      f'![Samples]({SAMPLES})',
      '',
      'Samples that the run drew when its training ended, not selected.',
      '',
    ]
  return lines


def _use(model: Model) -> list[str]:
  name, run = model.name, f'runs/{model.name.rpartition("/")[2]}'
  classes = ''
  if model.keys['condition.name']:  # not known from the folder alone
    number = model.keys['condition.classes']
    classes = f' \\\n  --config.condition.classes={number}'
  return [
    '## Use',
    '',
    'With diffusers:',
    '',
    '```python',
    snippet(model.keys, model.name).rstrip('\n'),
    '```',
    '',
    'With ddpm_jax, as a run to sample from, evaluate, and train further:',
    '',
    '```bash',
    f'python -m ddpm_jax.main --mode=convert '
    f'--input={shlex.quote(name)} --output={shlex.quote(run)}'
    f'{classes}',
    '```',
    '',
    '```python',
    'import ddpm_jax',
    '',
    f'images = ddpm_jax.load({run!r}).sample(16)  # uint8, (16, H, W, C)',
    '```',
    '',
  ]


def snippet(keys: Keys, path: str | pathlib.Path) -> str:
  """Returns Python code that samples from an exported model with diffusers.

  Args:
    keys: The recipe, flattened.
    path: Folder of the model, or its name on the Hub.
  """
  pipeline = f'DDPMPipeline.from_pretrained({str(path)!r})'
  if not keys['condition.name']:
    return (
      'from diffusers import DDPMPipeline\n\n'
      f'pipeline = {pipeline}\n'
      f'image = pipeline(num_inference_steps={keys["schedule.T"]}).images[0]\n'
    )
  # DDPMPipeline passes no labels to its network.
  classes, drop = keys['condition.classes'], keys['condition.drop']
  height, width, channels = _shape(keys)
  # Guidance leaves the variance as it is.
  learned = keys['sampler.variance'] == 'learned_range'
  part = f'[:, :{channels}]' if learned else ''
  guided = f"""\
  # With guidance w, also:
  # none = torch.full_like(labels, {classes})
  # without = unet(x, t, class_labels=none).sample
  # out{part} += (w - 1) * (out - without){part}
"""
  return f"""\
import torch
from diffusers import DDPMPipeline

torch.set_grad_enabled(False)
pipeline = {pipeline}
unet, scheduler = pipeline.unet, pipeline.scheduler
labels = torch.arange({classes})  # one an image\
{f'; {classes} is no class' if drop else ''}
x = torch.randn(len(labels), {channels}, {height}, {width})
for t in scheduler.timesteps:
  out = unet(x, t, class_labels=labels).sample
{guided if drop else ''}\
  x = scheduler.step(out, t, x).prev_sample
images = (x / 2 + 0.5).clamp(0, 1)  # (N, C, H, W)
"""


def _shape(keys: Keys) -> tuple[int, int, int]:
  """(height, width, channels)."""
  size = keys['data.image_size']
  height, width = size if isinstance(size, Sequence) else (size, size)
  return height, width, keys['data.channels']


def _training(model: Model, run: pathlib.Path, defaults: Keys) -> list[str]:
  keys = model.keys
  lines = [
    '## Training',
    '',
    f'- Data: {_data(keys)}',
    f'- Steps: {model.step:,}, of {keys["batch_size"]} images each',
    f'- Weights: {model.weights}, of step {model.step:,}'
    + (f' (decay {keys["optimizer.ema"]})' if model.weights == 'EMA' else ''),
  ]
  if workdirs.is_imported(run):
    lines.append('- Step 0: weights that were trained elsewhere')
  for change in _changes(run):
    changed = ', '.join(
      _code(key) for key in change if key not in ('step', 'time')
    )
    step = _plain(str(change.get('step', '?')))
    lines.append(f'- Changed from step {step} on: {changed}')
  names = _classes(run, keys)
  if names:
    lines += ['- Classes:', *names]
  differ = {
    key: value
    for key, value in keys.items()
    if not {key, key.split('.')[0]} & {*LEFT_OUT}
    and (key not in defaults or defaults[key] != value)
  }
  return [
    *lines,
    '',
    'The recipe, where it differs from `configs/base.py` of ddpm_jax:',
    '',
    '```python',
    *(f'{k} = {errors.short(repr(v), 500)}' for k, v in differ.items()),
    '```',
    '',
  ]


def _data(keys: Keys) -> str:
  name = keys['data.name']
  if name == 'tfds':
    return f'{_code(keys["data.tfds"])} of TensorFlow Datasets, split ' + (
      _code(keys['data.split'])
    )
  if name == 'digits':
    return 'the digits of scikit-learn'
  path = pathlib.Path(keys['data.path']).stem
  return f'{_code(path)} ({_plain(name)})' if path else _code(name)


def _classes(run: pathlib.Path, keys: Keys) -> list[str]:
  """Returns a list of the classes that the network knows, by number."""
  count = keys['condition.classes'] if keys['condition.name'] else 0
  names = list(keys['data.names'] or workdirs.read_classes(run) or ())[:count]
  if names == [str(i) for i in range(len(names))]:
    return []
  lines = [f'  - {i}: {_code(name)}' for i, name in enumerate(names[:MOST])]
  return lines + ['  - ...'] * (len(names) > MOST)


def _changes(run: pathlib.Path) -> list[Entry]:
  """Returns the entries of changes.json."""
  path = run / 'changes.json'
  try:
    found = jsonfile.read(path) if path.exists() else []
  except errors.UserError as e:
    logging.warning('%s; the model card leaves it out', e)
    return []
  return [x for x in found if isinstance(x, dict)] if found else []


def _scores(scores: Scores) -> list[str]:
  kinds: list[tuple[Sequence[Entry], Callable[[Entry], tuple[str, str]]]] = [
    (scores.bounds, _bound),
    (scores.of_samples, _of_samples),
    (scores.small_data, _small_data),
  ]
  rows = []
  for entries, row in kinds:
    for entry in entries:
      try:
        value, how = row(entry)
        step = f'{entry["step"]:,}'
      except (KeyError, TypeError, ValueError, AttributeError) as e:
        logging.warning('the model card leaves out a score without %s', e)
        continue
      rows.append(f'| {value} | {step} | {_plain(how)} |')
  if not rows:
    return ['## Scores', '', 'None were measured.', '']
  return [
    '## Scores',
    '',
    '| score | step | protocol |',
    '|---|---|---|',
    *rows,
    '',
  ]


def _bound(e: Entry) -> tuple[str, str]:
  bits, error = e['bits_per_dim'], e['standard_error']
  value = f'{bits:.3f} ± {error:.3f} bits/dim (upper bound)'
  drawn = f't = 1 and {e["times_an_image"] - 1} drawn t'
  how = [
    f'{e["images"]:,} images of {e["data"]}, split {e["split"]}',
    'all t' if e['exact_in_t'] else drawn,
    f'{e["weights"]} weights',
    f'variance {e["variance"]}',
    f'seed {e["seed"]}',
  ]
  return value, ', '.join(how)


def _of_samples(e: Entry) -> tuple[str, str]:
  found = e['scores']
  values = [f'{k} {x:.2f}' for k, x in found.items() if k.startswith('FID')]
  values.append(f'IS {found["IS"]:.2f} ± {found["IS_deviation"]:.2f}')
  if 'KID' in found:
    values += [
      f'KID {found["KID"]:.5f} ± {found["KID_error"]:.5f}',
      f'precision {found["precision"]:.3f}',
      f'recall {found["recall"]:.3f}',
    ]
  how = [
    f'{e["samples"]:,} samples against {e["reference"]}',
    _sampling(e),
    f'resize {e["resize"]}',
    f'Inception {e["inception"]}',
  ]
  if 'KID_images' in found:
    how.append(f'KID, precision and recall of {found["KID_images"]:,} images')
  return ', '.join(values), ', '.join(how)


def _small_data(e: Entry) -> tuple[str, str]:
  values = []
  for title, key in (
    ('Fréchet distance', 'frechet_distance'),
    ('precision', 'precision'),
    ('recall', 'recall'),
  ):
    real = e.get(f'held_out_{key}')
    beside = '' if real is None else f' (held-out real images: {real:.3f})'
    values.append(f'{title} {e[key]:.3f}{beside}')
  how = (
    f'{e["fake_images"]:,} samples against {e["real_images"]:,} images of the '
    'data, in the features of a small classifier of these data (not FID), '
  )
  return ', '.join(values), how + _sampling(e)


def _sampling(e: Entry) -> str:
  how = f'{e["weights"]} weights, {e["sampler"]}, {e["sampler_steps"]} steps'
  guidance = e.get('sampler_options', {}).get('guidance', 1)
  if guidance != 1:
    how += f', guidance {guidance:g}'
  return f'{how}, seed {e["seed"]}'


def _license(model: Model) -> list[str]:
  if model.license != UNKNOWN:
    return ['## License', '', f'`{model.license}`', '']
  return [
    '## License',
    '',
    'To fill in here, and at the top of this file in place of `unknown`. The '
    'data may have terms of their own.',
    '',
  ]


def _plain(text: str) -> str:
  """Text of a run, as text of Markdown, also inside a table."""
  return re.sub(r'([|<>`*\[\]])', r'\\\1', ' '.join(text.split()))


def _code(text: str) -> str:
  """Text of a run, as code of Markdown."""
  return f'`{" ".join(str(text).split()).replace("`", "_")}`'
