"""Other people's weights: what diffusers answers, we answer; and back again.

tests/golden/diffusers holds what torch and diffusers answered; its script says
how it was made. `test_diffusers.py` asks them anew.
"""

import functools
import json
import re
import shutil
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_diffusers as golden
from safetensors import numpy as safetensors_numpy

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax import ranges
from ddpm_jax import recipe
from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import variances
from ddpm_jax.evaluation import record
from ddpm_jax.interop import diffusers
from ddpm_jax.interop import fields
from ddpm_jax.interop import files
from ddpm_jax.parallel import meshes
from ddpm_jax.storage import checkpoint

# The files that google/ddpm-cifar10-32 publishes.
CIFAR = {
  '_class_name': 'UNet2DModel',
  '_diffusers_version': '0.0.4',
  'act_fn': 'silu',
  'attention_head_dim': None,
  'block_out_channels': [128, 256, 256, 256],
  'center_input_sample': False,
  'down_block_types': [
    *('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D')
  ],
  'downsample_padding': 0,
  'flip_sin_to_cos': False,
  'freq_shift': 1,
  'in_channels': 3,
  'layers_per_block': 2,
  'mid_block_scale_factor': 1,
  'norm_eps': 1e-06,
  'norm_num_groups': 32,
  'out_channels': 3,
  'sample_size': 32,
  'time_embedding_type': 'positional',
  'up_block_types': ['UpBlock2D', 'UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'],
}
SCHEDULER = {
  '_class_name': 'DDPMScheduler',
  '_diffusers_version': '0.1.1',
  'beta_end': 0.02,
  'beta_schedule': 'linear',
  'beta_start': 0.0001,
  'clip_sample': True,
  'num_train_timesteps': 1000,
  'trained_betas': None,
  'variance_type': 'fixed_large',
}
# And ddpm-church-256, with bedroom, cat and celebahq.
CHURCH = CIFAR | {
  'block_out_channels': [128, 128, 256, 256, 512, 512],
  'down_block_types': [
    *['DownBlock2D'] * 4,
    *('AttnDownBlock2D', 'DownBlock2D'),
  ],
  'sample_size': 256,
  'up_block_types': ['UpBlock2D', 'AttnUpBlock2D', *['UpBlock2D'] * 4],
}


def configured(unet, scheduler):
  """The whole recipe that follows from the fields."""
  config = recipe.shipped('base')
  config.update_from_flattened_dict(fields.to_recipe(unet, scheduler))
  if unet.get('num_class_embeds'):
    config.condition.classes = unet['num_class_embeds'] - 1
  return config


def abstract_params(config):
  return jax.eval_shape(lambda: build.init_state(config)).params


@functools.cache
def golden_model(name):
  """(name, tensors, recipe, our weights) of a golden model."""
  model = files.read_model(golden.FOLDER / name)
  config = configured(model.unet, model.scheduler)
  tensors = files.read_tensors(model.weights)
  params = diffusers.to_params(
    abstract_params(config), tensors, diffusers.DIFFUSERS
  )
  return name, tensors, config, params


@pytest.fixture(params=golden.MODELS)
def imported(request):
  return golden_model(request.param)


def test_outputs_are_those_of_diffusers(imported):
  name, _, config, params = imported
  expected = np.load(golden.FOLDER / name / 'expected.npz')
  given = [expected['x'], expected['t'] + 1]
  if name == 'label':
    classes = config.condition.classes
    # The last row is for no class.
    labels = np.where(expected['labels'] == classes, -1, expected['labels'])
    assert {*labels} == {-1, *range(classes)}
    given.append(labels)
  out = jax.jit(build.network(config).apply)({'params': params}, *given)
  scale = np.max(np.abs(expected['out']))
  # Sums of hundreds of float32 products, in another order.
  np.testing.assert_allclose(out, expected['out'], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize('variance', golden.VARIANCES)
@pytest.mark.parametrize('prediction', golden.PREDICTIONS)
def test_ancestral_steps_are_those_of_diffusers(prediction, variance):
  """Theirs are affine in the noise: mean + σ z, with z of our keys."""
  expected = np.load(golden.FOLDER / 'steps.npz')
  x = jnp.asarray(expected['x'])
  out = (
    expected['out'] if variance == 'learned_range' else expected['out'][..., :3]
  )
  keys = jax.random.split(jax.random.key(0), len(x))
  z = process.normal(keys, x.shape[1:])

  @jax.jit
  def step(t):
    denoiser = denoisers.Denoiser(
      schedules.linear(),
      lambda x, t: jnp.asarray(out),
      getattr(predictions, fields.PREDICTIONS[prediction]),
      getattr(variances, fields.VARIANCES[variance]),
    )
    return samplers.ancestral(denoiser, keys, x, t)

  for t in golden.TIMES:
    mean, sigma = expected[f'{prediction}/{variance}/{t}']
    x_prev, _ = step(jnp.array(t + 1))
    # Their tables are products in float32: β_2 there is off by 3e-4 of itself,
    # and with it the weights of x_t and x̂_0.
    np.testing.assert_allclose(x_prev, mean + sigma * z, rtol=0, atol=1e-3)
    if t == 0:
      assert not np.any(sigma)


def test_a_chain_of_1000_steps_is_that_of_diffusers():
  name, _, config, params = golden_model('rgb')
  expected = np.load(golden.FOLDER / name / 'expected.npz')
  x = jnp.asarray(expected['x'])
  noise = jnp.stack([golden.noise(10 + t, x.shape) for t in range(1000)])
  p = build.sampler(config)

  def step(denoiser, keys, x_t, t, *_):
    mean, x0_hat = samplers.greedy(denoiser, keys, x_t, t)
    log_var = variances.beta(denoiser.schedule, None, t)
    sigma = jnp.where(t > 1, jnp.exp(log_var / 2), 0)
    return mean + sigma * noise[t - 1], x0_hat

  keys = jax.random.split(jax.random.key(0), len(x))

  @jax.jit
  def draw(params, x):
    return samplers.sample(step, p.denoiser(params), keys, x).x_0

  x_0 = draw(params, x)
  assert np.std(expected['chain']) > 0.1
  np.testing.assert_allclose(x_0, expected['chain'], rtol=0, atol=1e-3)


def test_a_class_embedding_is_ours_and_the_dense_layer_after_it():
  """Of width 8 here, and of 16 there."""
  *_, config, _ = golden_model('label')
  config = config.copy_and_resolve_references()
  config.condition.width = 8
  leaves, tree = jax.tree.flatten(abstract_params(config))
  ours = jax.tree.unflatten(
    tree, [golden.noise(i, x.shape) / 4 for i, x in enumerate(leaves)]
  )
  tensors = diffusers.from_params(ours, diffusers.DIFFUSERS)
  assert tensors[diffusers.CLASSES].shape == (4, 16)
  wide = config.copy_and_resolve_references()
  wide.condition.width = 16
  theirs = diffusers.to_params(
    abstract_params(wide), tensors, diffusers.DIFFUSERS
  )
  x, labels = golden.noise(0, (4, 8, 8, 1)), np.array([0, 1, 2, -1])

  def answers(config, params):
    apply = jax.jit(build.network(config).apply)
    return [
      apply({'params': params}, x, np.full(4, 500), told)
      for told in (labels, np.roll(labels, 1))
    ]

  (a, other), (b, _) = answers(config, ours), answers(wide, theirs)
  scale = np.max(np.abs(a))
  assert np.min(np.std(a, axis=(1, 2, 3))) > 0.1 * scale
  np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)
  # And the label says something.
  assert np.max(np.abs(a - other)) > 0.01 * scale


def test_weights_come_back_bit_for_bit(imported):
  _, tensors, _, params = imported
  modern = {diffusers.modern(name): x for name, x in tensors.items()}
  back = diffusers.from_params(params, diffusers.DIFFUSERS)
  assert back.keys() == modern.keys()
  for name, x in back.items():
    np.testing.assert_array_equal(x, modern[name], strict=True)


@pytest.mark.parametrize(
  'imported', sorted(golden.MODELS.keys() - {'label'}), indirect=True
)
def test_pytorch_diffusion_has_other_names_for_the_same(imported):
  _, tensors, config, params = imported
  last = len(config.model.multipliers) - 1
  other = {}
  for name, x in tensors.items():
    name = diffusers.modern(name)
    if 'attentions' in name and x.ndim == 2:
      x = x[..., None, None]  # convolutions there
    name = re.sub(r'up_blocks\.(\d+)', lambda m: f'up.{last - int(m[1])}', name)
    for here, there in (
      ('time_embedding.linear_1', 'temb.dense.0'),
      ('time_embedding.linear_2', 'temb.dense.1'),
      ('down_blocks', 'down'),
      ('mid_block.resnets.0', 'mid.block_1'),
      ('mid_block.attentions.0', 'mid.attn_1'),
      ('mid_block.resnets.1', 'mid.block_2'),
      ('resnets', 'block'),
      ('attentions', 'attn'),
      ('downsamplers.0', 'downsample'),
      ('upsamplers.0', 'upsample'),
      ('time_emb_proj', 'temb_proj'),
      ('conv_shortcut', 'nin_shortcut'),
      ('conv_norm_out', 'norm_out'),
      ('group_norm', 'norm'),
      *(('to_q', 'q'), ('to_k', 'k'), ('to_v', 'v')),
      ('to_out.0', 'proj_out'),
    ):
      name = name.replace(here, there)
    other[name] = x
  same = diffusers.to_params(params, other, diffusers.PYTORCH_DIFFUSION)
  chex.assert_trees_all_equal(same, params)


@pytest.mark.parametrize(
  ('unet', 'count'), [(CIFAR, 35_746_307), (CHURCH, 113_673_219)]
)
def test_the_released_models_have_the_papers_parameters(unet, count):
  config = configured(unet, SCHEDULER)
  sizes = [x.size for x in jax.tree.leaves(abstract_params(config))]
  assert sum(sizes) == count


@pytest.mark.parametrize(
  ('unet', 'variance', 'ours'),
  [
    (CIFAR, 'fixed_large', 'configs/cifar.py'),
    (CHURCH, 'fixed_small', 'configs/lsun.py:church'),
  ],
)
def test_the_released_models_are_our_recipes(unet, variance, ours, monkeypatch):
  monkeypatch.chdir(recipe.CONFIGS.parent)
  keys = fields.to_recipe(unet, SCHEDULER | {'variance_type': variance})
  theirs, ours = keys, recipe.flatten(recipe.load(ours))
  # They were released for sampling: without the dropout of their training.
  assert theirs.pop('model.dropout') == 0.0
  assert theirs == {key: ours[key] for key in theirs}


@pytest.mark.parametrize('name', golden.MODELS)
def test_fields_written_and_read_again_are_the_same_recipe(name):
  model = files.read_model(golden.FOLDER / name)
  config = configured(model.unet, model.scheduler)
  unet, scheduler = fields.from_recipe(recipe.flatten(config), [])
  assert fields.to_recipe(unet, scheduler) == fields.to_recipe(*model[:2])


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('_class_name', 'UNet2DConditionModel'),
    ('act_fn', 'mish'),
    ('add_attention', False),
    ('attention_head_dim', 8),
    ('attn_norm_num_groups', 16),
    ('block_out_channels', [128, 192, 256, 256]),
    ('block_out_channels', 128),
    ('center_input_sample', True),
    ('class_embed_type', 'identity'),
    ('class_embed_type', 'timestep'),
    ('down_block_types', ['DownBlock2D'] * 3),
    ('down_block_types', ['SkipDownBlock2D'] * 4),
    ('down_block_types', ['DownBlock2D'] * 3 + ['ResnetDownsampleBlock2D']),
    ('downsample_padding', 1),
    ('downsample_type', 'resnet'),
    ('encoder_hid_dim', 3),
    ('flip_sin_to_cos', True),
    ('freq_shift', 0),
    ('in_channels', 4),
    ('layers_per_block', 0),
    ('mid_block_scale_factor', 1.4),
    ('mid_block_type', None),
    ('norm_eps', 1e-5),
    ('norm_num_groups', None),
    ('num_class_embeds', 0),
    ('out_channels', 6),
    ('resnet_time_scale_shift', 'scale_shift'),
    ('sample_size', None),
    ('time_embedding_dim', 128),
    ('time_embedding_type', 'fourier'),
    ('up_block_types', ['UpBlock2D'] * 4),
    ('upsample_type', 'resnet'),
  ],
)
def test_another_network_is_refused_by_its_field(field, value):
  with pytest.raises(errors.UserError) as caught:
    fields.to_recipe(CIFAR | {field: value}, SCHEDULER)
  # Types that do not match are told as one mistake or the other.
  told = 'block_types' if field.endswith('block_types') else f'{field}='
  assert told in str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('_class_name', 'DDIMScheduler'),
    ('beta_schedule', 'sigmoid'),
    ('beta_start', None),
    ('clip_sample', None),
    ('clip_sample_range', 2.0),
    ('num_train_timesteps', 0),
    ('predict_epsilon', False),
    ('prediction_type', 'flow'),
    ('rescale_betas_zero_snr', 'yes'),
    ('sigma_data', 0.5),
    ('steps_offset', 1),
    ('thresholding', True),
    ('trained_betas', [0.1]),
    ('variance_type', 'fixed_large_log'),
    ('variance_type', 'learned'),  # σ² there, log σ² here
  ],
)
def test_another_process_is_refused_by_its_field(field, value):
  with pytest.raises(errors.UserError, match=f'{field}='):
    fields.to_recipe(CIFAR, SCHEDULER | {field: value})


def test_what_is_absent_means_what_it_means_to_diffusers():
  """All that differs is named at once."""
  with pytest.raises(errors.UserError) as caught:
    fields.to_recipe({'sample_size': 32}, {})
  for field in (
    *('attention_head_dim=8', 'flip_sin_to_cos=True', 'freq_shift=0'),
    *('norm_eps=1e-05', 'downsample_padding=1'),
  ):
    assert f'{field}, its default' in str(caught.value)


def test_a_learned_variance_needs_as_many_channels():
  learned = SCHEDULER | {'variance_type': 'learned_range'}
  with pytest.raises(errors.UserError, match='out_channels=3'):
    fields.to_recipe(CIFAR, learned)
  keys = fields.to_recipe(CIFAR | {'out_channels': 6}, learned)
  assert keys['model.variance'] == 'learned_range'
  assert keys['loss.name'] == 'hybrid'


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('model.name', 'mlp'),
    ('condition.name', 'minilm'),
    ('condition.name', 'text'),
    ('model.patch', 2),
    ('model.predict', 'mu'),
    ('sampler.variance', 'learned'),
    ('sampler.spacing', 'quadratic'),
    ('model.multipliers', (2, 2)),
  ],
)
def test_what_has_no_counterpart_is_not_written(key, value):
  keys = recipe.flatten(recipe.shipped('cifar')) | {key: value}
  with pytest.raises(errors.UserError, match=re.escape(f'config.{key}=')):
    fields.from_recipe(keys, [])


@pytest.mark.parametrize('name', ['text', 'minilm'])
def test_texts_are_not_written_as_they_need_cross_attention(name):
  keys = recipe.flatten(recipe.shipped('cifar')) | {'condition.name': name}
  with pytest.raises(errors.UserError) as caught:
    fields.from_recipe(keys, [])
  for told in ('no cross-attention', 'UNet2DConditionModel', "'label'"):
    assert told in str(caught.value)


@pytest.mark.parametrize(('drop', 'rows'), [(0.1, 11), (0.0, 10)])
def test_classes_have_a_row_each_and_one_for_none_if_it_was_trained(drop, rows):
  keys = recipe.flatten(recipe.shipped('cifar')) | {
    'condition.name': 'label',
    'condition.classes': 10,
    'condition.drop': drop,
  }
  unet, scheduler = fields.from_recipe(keys, [])
  assert unet['num_class_embeds'] == rows
  assert unet['class_embed_type'] is None
  keys = fields.to_recipe(unet, scheduler)
  assert keys['condition.name'] == 'label'
  assert keys['condition.width'] == 4 * 128


def test_zero_terminal_snr_is_kept_both_ways():
  zero = {'rescale_betas_zero_snr': True, 'prediction_type': 'v_prediction'}
  keys = fields.to_recipe(CIFAR, SCHEDULER | zero)
  assert keys['schedule.zero_terminal_snr']
  whole = recipe.flatten(recipe.shipped('cifar')) | keys
  _, scheduler = fields.from_recipe(whole, [])
  assert zero.items() <= scheduler.items()


def test_the_only_step_of_one_is_the_same_both_ways():
  """diffusers' linear has β_1 there, ours β_T."""
  theirs = SCHEDULER | {'num_train_timesteps': 1, 'beta_start': 0.5}
  keys = fields.to_recipe(CIFAR, theirs)
  assert keys['schedule.beta_T'] == 0.5
  whole = recipe.flatten(recipe.shipped('cifar')) | keys
  _, scheduler = fields.from_recipe(whole, [0.5])
  assert scheduler['trained_betas'] == [0.5]


ABSURD = [
  *(None, 'x', '', -1, 0, 1.5, True, False, 10**9, 10**30, 10**400),
  *([], {}, [[]], [10**9], [4] * 17, ['x'] * 17, [1] * 10_000, 'x' * 100_000),
  *(float('nan'), float('inf'), {'a': {}}),
]


@pytest.mark.parametrize('field', [*fields.UNET_DEFAULTS, *SCHEDULER, 'other'])
def test_no_number_of_a_configuration_is_absurd(field):
  """It is refused at once in one line, or is a recipe that is within bounds."""
  begun, refused = time.monotonic(), 0
  for value in ABSURD:
    change = {field: value}
    for of_unet in (True, False):
      try:
        keys = fields.to_recipe(
          CIFAR | change if of_unet else CIFAR,
          SCHEDULER if of_unet else SCHEDULER | change,
        )
        ranges.check(keys)
      except errors.UserError as e:
        refused += 1
        told = str(e)
        assert '\n' not in told, value
        assert len(told) < 1500, value
  assert refused > len(ABSURD) / 2 or field == '_diffusers_version'
  assert time.monotonic() - begun < 2


@pytest.mark.parametrize('text', [b'', b'\xff', b'[]', b'{"a":' * 100_000])
def test_a_configuration_that_is_none_is_a_line(text, tmp_path):
  folder = copy_of('rgb', tmp_path / 'in')
  for name in (files.UNET[0], files.SCHEDULER[0]):
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(text)
    with pytest.raises(errors.UserError, match=f'{path.name} is damaged'):
      files.read_model(folder)
    path.write_bytes(b' ' * 2**21 + whole)
    with pytest.raises(errors.UserError, match='longer than'):
      files.read_model(folder)
    path.write_bytes(whole)


def test_a_network_deeper_than_its_weights_is_not_built(tmp_path):
  folder = copy_of('rgb', tmp_path / 'in')
  path = folder / files.UNET[0]
  path.write_text(
    json.dumps({**json.loads(path.read_text()), 'layers_per_block': 1000})
  )
  begun = time.monotonic()
  with pytest.raises(errors.UserError, match='layers_per_block'):
    convert(f'--input={folder}', f'--output={tmp_path}/out')
  assert time.monotonic() - begun < 5
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('part', ['dtype', 'shape', 'data_offsets'])
def test_no_number_of_a_file_of_tensors_is_absurd(part, tmp_path):
  whole = (golden.FOLDER / 'rgb' / files.SAFE[0]).read_bytes()
  length = int.from_bytes(whole[:8], 'little')
  head, path = json.loads(whole[8 : 8 + length]), tmp_path / 'a.safetensors'
  name = next(name for name in head if name != '__metadata__')
  for value in [*ABSURD, [0, 10**18], [-1]]:
    text = json.dumps({**head, name: {**head[name], part: value}}).encode()
    body = len(text).to_bytes(8, 'little') + text + whole[8 + length :]
    path.write_bytes(body)
    with pytest.raises(errors.UserError, match='cannot be read') as caught:
      files.read_tensors(path)
    assert len(str(caught.value)) < len(str(path)) + 300


def copy_of(name, folder):
  shutil.copytree(golden.FOLDER / name, folder)
  return folder


def convert(*args):
  main.run(['--mode=convert', *(str(arg) for arg in args)])


@pytest.mark.parametrize(
  'name',
  [
    'unet/config.json',
    'scheduler/scheduler_config.json',
    'unet/diffusion_pytorch_model.safetensors',
  ],
)
def test_a_missing_file_is_named(tmp_path, name):
  folder = copy_of('rgb', tmp_path / 'in')
  (folder / name).unlink()
  with pytest.raises(errors.UserError, match=f'has no {name}'):
    convert(f'--input={folder}', f'--output={tmp_path}/out')


def test_truncated_weights_are_noticed(tmp_path):
  folder = copy_of('rgb', tmp_path / 'in')
  path = folder / files.SAFE[0]
  whole = path.read_bytes()
  for size in (0, 7, 100, len(whole) - 1):
    path.write_bytes(whole[:size])
    with pytest.raises(errors.UserError, match='cannot be read'):
      convert(f'--input={folder}', f'--output={tmp_path}/out')
  (folder / files.UNET[0]).write_text('{')
  with pytest.raises(errors.UserError, match=r'config\.json is damaged'):
    convert(f'--input={folder}', f'--output={tmp_path}/out')


@pytest.mark.parametrize(
  ('change', 'told'),
  [
    (lambda t: t.pop('conv_in.bias'), 'lack: conv_in.bias'),
    (lambda t: t.update(extra=np.zeros(3)), 'no place in the network: extra'),
    (
      lambda t: t.update({'conv_in.bias': np.zeros(3, np.float32)}),
      r'conv_in.bias is \(3,\)',
    ),
    (
      lambda t: t.update({'conv_in.bias': np.full(4, np.nan, np.float32)}),
      'conv_in.bias has values that are not finite',
    ),
  ],
)
def test_weights_of_another_network_are_named(tmp_path, change, told):
  folder = copy_of('rgb', tmp_path / 'in')
  tensors = safetensors_numpy.load_file(folder / files.SAFE[0])
  change(tensors)
  safetensors_numpy.save_file(tensors, folder / files.SAFE[0])
  with pytest.raises(errors.UserError, match=told):
    convert(f'--input={folder}', f'--output={tmp_path}/out')


def test_half_precision_weights_become_float32(tmp_path):
  folder = copy_of('learned', tmp_path / 'in')
  tensors = safetensors_numpy.load_file(folder / files.SAFE[0])
  half = {name: x.astype(np.float16) for name, x in tensors.items()}
  safetensors_numpy.save_file(half, folder / files.SAFE[0])
  model = files.read_model(folder)
  params = diffusers.to_params(
    abstract_params(configured(model.unet, model.scheduler)),
    files.read_tensors(model.weights),
    diffusers.DIFFUSERS,
  )
  kernel = params['conv_in']['kernel']
  assert kernel.dtype == np.float32
  expected = half['conv_in.weight'].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(kernel, expected)


def test_pickles_are_not_read_without_torch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  folder = copy_of('rgb', tmp_path / 'in')
  (folder / files.SAFE[0]).rename(folder / files.PICKLED[0])
  for args in (
    [f'--input={folder}'],
    [f'--input={folder}/{files.PICKLED[0]}', '--config=configs/cifar.py'],
  ):
    monkeypatch.chdir(recipe.CONFIGS.parent)
    with pytest.raises(errors.UserError, match=r'is a pickle.*install torch'):
      convert(*args, f'--output={tmp_path}/out')


def test_a_name_on_the_hub_needs_the_hub(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  for name, told in (
    ('google/ddpm-cifar10-32', r'huggingface_hub: pip install -e .\.\[hub\]'),
    ('/no/such/folder', 'no such folder or file'),
  ):
    with pytest.raises(errors.UserError, match=told):
      convert(f'--input={name}', '--output=out')


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
  """A workdir of the golden model `rgb`, with images of our own for data."""
  folder = tmp_path_factory.mktemp('converted')
  grays = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3))
  np.savez(folder / 'data.npz', images=grays.astype(np.uint8))
  convert(
    f'--input={golden.FOLDER / "rgb"}',
    f'--output={folder / "run"}',
    '--config.data.name=arrays',
    '--config.batch_size=16',
    '--config.optimizer.warmup=0',
  )
  return folder / 'run'


QUICK = ('--config.sampler.steps=5', '--config.parallel.data=1')


def drawn_by(run, output):
  main.run(
    [
      *('--mode=sample', f'--workdir={run}', '--num_samples=9'),
      *(f'--output={output}', *QUICK),
    ]
  )
  return np.load(output)['images']


def test_a_run_exported_and_imported_draws_the_same(converted, tmp_path):
  convert(f'--workdir={converted}', f'--output={tmp_path / "theirs"}')
  convert(f'--input={tmp_path / "theirs"}', f'--output={tmp_path / "again"}')
  drawn = drawn_by(converted, tmp_path / 'a.npz')
  assert drawn.shape == (9, 8, 8, 3)
  assert np.std(drawn) > 10
  again = drawn_by(tmp_path / 'again', tmp_path / 'b.npz')
  np.testing.assert_array_equal(drawn, again)
  a, b = (
    safetensors_numpy.load_file(folder / files.SAFE[0])
    for folder in (golden.FOLDER / 'rgb', tmp_path / 'theirs')
  )
  for name in a.keys() | b.keys():
    np.testing.assert_array_equal(a[name], b[name])
  index = json.loads((tmp_path / 'theirs' / 'model_index.json').read_text())
  assert index['_class_name'] == 'DDPMPipeline'


@pytest.mark.parametrize(('classes', 'drop'), [(3, 0.1), (4, 0.0)])
def test_a_model_with_classes_becomes_a_run_and_is_itself_again(
  classes, drop, tmp_path, capfd
):
  theirs, run, again = golden.FOLDER / 'label', tmp_path / 'run', tmp_path / 'a'
  convert(
    *(f'--input={theirs}', f'--output={run}'),
    f'--config.condition.classes={classes}',
  )
  assert recipe.resolve(None, run, {}).condition.drop == drop
  told = 'guidance is not for it'
  assert (told in capfd.readouterr().err) == (drop == 0)
  convert(f'--workdir={run}', f'--output={again}')
  a, b = (
    safetensors_numpy.load_file(folder / files.SAFE[0])
    for folder in (theirs, again)
  )
  assert a.keys() == b.keys()
  for name, x in a.items():
    np.testing.assert_array_equal(x, b[name])
  assert files.read_model(again).unet['num_class_embeds'] == 4
  advice = capfd.readouterr().err
  assert f'labels = torch.arange({classes})' in advice
  assert ('3 is no class' in advice) == ('guidance w' in advice) == (drop > 0)


@pytest.mark.parametrize('classes', ['', '2', '5'])
def test_what_the_last_class_embedding_means_has_to_be_said(classes, tmp_path):
  given = [f'--config.condition.classes={classes}'] if classes else []
  with pytest.raises(errors.UserError, match=r'num_class_embeds=4.*=4 .*=3 '):
    convert(
      *(f'--input={golden.FOLDER / "label"}', f'--output={tmp_path / "run"}'),
      *given,
    )
  assert not (tmp_path / 'run').exists()


def test_flags_that_do_not_go_together_are_told(tmp_path, converted):
  model, run = golden.FOLDER / 'rgb', converted
  before = sorted(run.rglob('*'))
  for args, told in (
    ([f'--input={model}'], 'convert takes'),
    (['--output=x'], 'convert takes'),
    ([f'--input={model}', f'--workdir={run}', '--output=x'], 'convert takes'),
    ([f'--input={model}', f'--output={run}'], 'exists already'),
    ([f'--workdir={run}', f'--output={run}'], 'exists already'),
    ([f'--workdir={tmp_path}/no', '--output=x'], 'no run in'),
    (
      [f'--input={model}', '--output=x', '--config.model.channels=8'],
      r'config\.model\.channels is 4 in',
    ),
    (
      [f'--input={model}/{files.SAFE[0]}', '--output=x'],
      'does not contain its recipe',
    ),
    (
      [
        *(f'--input={model}/{files.SAFE[0]}', '--output=x'),
        f'--config={recipe.CONFIGS}/digits_text.py',
      ],
      'without a condition',
    ),
  ):
    with pytest.raises(errors.UserError, match=told):
      convert(*args)
  assert sorted(run.rglob('*')) == before
  with pytest.raises(errors.UserError, match='--input is for'):
    main.run(['--mode=sample', f'--workdir={run}', f'--input={model}'])


def test_it_is_evaluated_and_goes_on_training(converted, tmp_path, capfd):
  run = tmp_path / 'run'
  shutil.copytree(converted, run)
  data = f'--config.data.path={converted.parent / "data.npz"}'
  few = ['--config.evaluate.draws=2', '--config.evaluate.images=8']
  main.run(['--mode=evaluate', f'--workdir={run}', data, *few, *QUICK])
  (found,) = record.read(run)['bounds']
  assert found['step'] == 0
  assert 0 < found['bits_per_dim'] < 1000
  main.run(
    [
      *(f'--workdir={run}', data, *QUICK, '--num_samples=1'),
      *('--config.steps=2', '--config.log.every=1'),
    ]
  )
  said = capfd.readouterr().err
  assert 'resuming from step 0' in said
  assert 'random weights' not in said  # an average of imported ones is good
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [1, 2]
  assert checkpoint.steps(run / 'checkpoints') == [0, 2]
  with pytest.raises(errors.UserError, match=r'elsewhere\.npz.* is not a file'):
    main.run([f'--workdir={run}', '--config.data.path=elsewhere.npz'])


def test_it_begins_with_the_weights_and_nothing_else(converted):
  config = recipe.resolve(None, converted, {})
  mesh = build.mesh(config)
  abstract = meshes.abstract_state(lambda: build.init_state(config), mesh)
  saved = checkpoint.restore(
    converted / 'checkpoints', checkpoint.trained(abstract), abstract.ema_params
  )
  tensors = files.read_tensors(golden.FOLDER / 'rgb' / files.SAFE[0])
  params = diffusers.to_params(abstract.params, tensors, diffusers.DIFFUSERS)
  for found in (saved.ema, saved.state['params']):
    chex.assert_trees_all_equal(found, params)
  assert saved.step == saved.state['step'] == 0
  assert saved.data == {'next_index': 0}
  opt_state = saved.state['opt_state']
  chex.assert_trees_all_equal(
    opt_state, jax.tree.map(jnp.zeros_like, opt_state)
  )
