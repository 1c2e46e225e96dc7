"""Makes tests/golden/diffusers: what diffusers answers, for our tests to find.

  python tests/golden/make_diffusers.py

It needs torch and diffusers (made with 2.13 and 0.42.1); the tests need neither
and import only what is above `made_by_torch`.
"""

import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / 'diffusers'
# What makes a UNet2DModel our network.
OURS = {
  'downsample_padding': 0,
  'flip_sin_to_cos': False,
  'freq_shift': 1,
  'norm_eps': 1e-6,
  'attention_head_dim': None,
}
PLAIN, ATTENTION = 'DownBlock2D', 'AttnDownBlock2D'
# name: (fields of the network, fields of the scheduler)
MODELS = {
  'rgb': (
    {
      'sample_size': 8,
      'block_out_channels': [4, 8],
      'down_block_types': [PLAIN, ATTENTION],
      'layers_per_block': 1,
      'norm_num_groups': 2,
    },
    {'variance_type': 'fixed_large'},
  ),
  'gray': (
    {
      'sample_size': [8, 16],
      'in_channels': 1,
      'out_channels': 1,
      'block_out_channels': [4, 4, 8],
      'down_block_types': [ATTENTION, PLAIN, ATTENTION],
      'layers_per_block': 1,
      'norm_num_groups': 4,
    },
    {
      'variance_type': 'fixed_small',
      'prediction_type': 'v_prediction',
      'beta_schedule': 'scaled_linear',
      'num_train_timesteps': 200,
    },
  ),
  'learned': (
    {
      'sample_size': 8,
      'out_channels': 6,
      'block_out_channels': [4],
      'down_block_types': [PLAIN],
      'layers_per_block': 2,
      'norm_num_groups': 1,
    },
    {
      'variance_type': 'learned_range',
      'prediction_type': 'sample',
      'beta_schedule': 'squaredcos_cap_v2',
      'clip_sample': False,
    },
  ),
  'label': (
    {
      'sample_size': 8,
      'in_channels': 1,
      'out_channels': 1,
      'block_out_channels': [4, 8],
      'down_block_types': [PLAIN, PLAIN],
      'layers_per_block': 1,
      'norm_num_groups': 2,
      'num_class_embeds': 4,  # three classes, and none
    },
    {'variance_type': 'fixed_large'},
  ),
}
# Of the images that a model with classes is asked about, two of each.
LABELS = (0, 1, 2, 3)
PREDICTIONS = ('epsilon', 'sample', 'v_prediction')
VARIANCES = ('fixed_small', 'fixed_large', 'learned_range')
TIMES = (0, 1, 2, 20, 500, 999)  # of diffusers, from 0


def noise(key: int, shape: tuple[int, ...]) -> np.ndarray:
  """Of mean 0 and variance 1, and the same wherever it is computed."""
  i = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(key * 1_000_003)
  for shift in (33, 29, 32):
    i = (i ^ (i >> np.uint64(shift))) * np.uint64(0xFF51AFD7ED558CCD)
  uniform = (i >> np.uint64(40)).astype(np.float64) / 2**24 - 0.5
  return (uniform * 12**0.5).astype(np.float32).reshape(shape)


# made_by_torch


def random_model(unet: dict, seed: int = 0):
  """A UNet2DModel whose every parameter is random, biases and scales too."""
  import diffusers
  import torch

  ups = [t.replace('Down', 'Up') for t in reversed(unet['down_block_types'])]
  model = diffusers.UNet2DModel(**{**OURS, **unet, 'up_block_types': ups})
  generator = torch.Generator().manual_seed(seed)
  for name, p in model.named_parameters():
    draw = torch.randn(p.shape, generator=generator)
    fan_in = p[0].numel() if p.ndim > 1 else 1
    at = 1.0 if 'norm' in name and name.endswith('weight') else 0.0
    spread = fan_in**-0.5 if p.ndim > 1 else 0.2
    p.data = at + spread * draw
  return model.eval()


def answer(model, x: np.ndarray, t, labels=None) -> np.ndarray:
  """Of a network, NHWC; `t` from 0."""
  import torch

  nchw = torch.tensor(x).permute(0, 3, 1, 2)
  told = None if labels is None else torch.tensor(labels)
  with torch.no_grad():
    out = model(nchw, torch.tensor(t), class_labels=told).sample
  return out.permute(0, 2, 3, 1).numpy()


def step(scheduler, out, x, t: int, noise: np.ndarray | float) -> np.ndarray:
  """One step of a scheduler, given the noise that it would draw; NHWC."""
  import importlib
  import inspect

  import torch

  module = importlib.import_module(inspect.getmodule(scheduler).__name__)

  def given(shape, generator=None, device=None, dtype=None):
    value = torch.as_tensor(np.asarray(noise, np.float32))
    value = value.permute(0, 3, 1, 2) if value.ndim == 4 else value
    return value.expand(shape)

  whole, module.randn_tensor = module.randn_tensor, given
  try:
    nchw = [torch.tensor(a).permute(0, 3, 1, 2) for a in (out, x)]
    made = scheduler.step(nchw[0], t, nchw[1])
  finally:
    module.randn_tensor = whole
  return made.prev_sample.permute(0, 2, 3, 1).numpy()


def chain(model, scheduler, x: np.ndarray, key: int) -> np.ndarray:
  """From x_T to x_0, with noise(key + t) at time t."""
  for t in scheduler.timesteps.tolist():
    out = answer(model, x, [t] * len(x))
    x = step(scheduler, out, x, t, noise(key + t, x.shape))
  return x


def old_names(folder: pathlib.Path) -> None:
  """A folder as released in 2022: flat, and attention under other names."""
  from safetensors import numpy as files

  path = folder / 'unet' / 'diffusion_pytorch_model.safetensors'
  tensors = files.load_file(path)
  for new, old in (
    *(('.to_q.', '.query.'), ('.to_k.', '.key.'), ('.to_v.', '.value.')),
    ('.to_out.0.', '.proj_attn.'),
  ):
    tensors = {name.replace(new, old): x for name, x in tensors.items()}
  files.save_file(tensors, folder / path.name, {'format': 'pt'})
  path.unlink()
  for part in ('unet', 'scheduler'):
    (file,) = (folder / part).iterdir()
    file.rename(folder / file.name)
    (folder / part).rmdir()


def main() -> None:
  import diffusers

  for seed, (name, (unet, scheduler)) in enumerate(MODELS.items()):
    model = random_model(unet, seed)
    pipeline = diffusers.DDPMPipeline(
      model, diffusers.DDPMScheduler(**scheduler)
    )
    pipeline.save_pretrained(FOLDER / name)
    size = unet['sample_size']
    sides = size if isinstance(size, list) else (size, size)
    T = scheduler.get('num_train_timesteps', 1000)
    t = [0, T * 3 // 5]
    labels = None
    if 'num_class_embeds' in unet:
      t, labels = t * len(LABELS), np.repeat(LABELS, len(t))
    x = noise(seed, (len(t), *sides, unet.get('in_channels', 3)))
    out = answer(model, x, t, labels)
    expected = {'x': x, 't': np.array(t), 'out': out}
    if labels is not None:
      expected['labels'] = labels
    if name == 'rgb':
      expected['chain'] = chain(model, pipeline.scheduler, x, key=10)
    np.savez_compressed(FOLDER / name / 'expected.npz', **expected)
    if name == 'gray':
      old_names(FOLDER / name)

  x, out = noise(1, (1, 2, 2, 3)), noise(2, (1, 2, 2, 6))
  steps = {}
  for prediction in PREDICTIONS:
    for variance in VARIANCES:
      scheduler = diffusers.DDPMScheduler(
        prediction_type=prediction, variance_type=variance
      )
      said = out if variance == 'learned_range' else out[..., :3]
      for t in TIMES:
        mean, moved = (step(scheduler, said, x, t, z) for z in (0.0, 1.0))
        steps[f'{prediction}/{variance}/{t}'] = np.stack([mean, moved - mean])
  np.savez_compressed(FOLDER / 'steps.npz', x=x, out=out, **steps)
  print(json.dumps({'torch': __import__('torch').__version__}))


if __name__ == '__main__':
  main()
