"""Side by side with torch and diffusers, where they are installed.

  pip install torch diffusers && python -m pytest -n 0 tests/test_diffusers.py

Elsewhere `test_convert.py` holds us to what they answered.
"""

import inspect
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import chex
import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_diffusers as golden

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax import pretrained
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax import sampling
from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import spacings
from ddpm_jax.diffusion import variances
from ddpm_jax.interop import card
from ddpm_jax.interop import diffusers as interop
from ddpm_jax.interop import fields

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

PLAIN, ATTENTION = golden.PLAIN, golden.ATTENTION
NETWORKS = {
  'rgb_32': {
    'sample_size': 32,
    'block_out_channels': [32, 64, 64],
    'down_block_types': [PLAIN, ATTENTION, PLAIN],
    'layers_per_block': 2,
    'norm_num_groups': 32,
  },
  'gray_32': {
    'sample_size': 32,
    'in_channels': 1,
    'out_channels': 1,
    'block_out_channels': [16, 48],
    'down_block_types': [PLAIN, PLAIN],
    'layers_per_block': 1,
    'norm_num_groups': 8,
    'attention_head_dim': 48,
  },
  'rgb_64_attention_at_two_levels': {
    'sample_size': 64,
    'block_out_channels': [16, 16, 32, 64],
    'down_block_types': [PLAIN, PLAIN, ATTENTION, ATTENTION],
    'layers_per_block': 2,
    'norm_num_groups': 4,
  },
  'learned_64_by_32': {
    'sample_size': [64, 32],
    'out_channels': 6,
    'block_out_channels': [16, 32],
    'down_block_types': [PLAIN, ATTENTION],
    'layers_per_block': 3,
    'norm_num_groups': 16,
  },
}
SCHEDULERS = {
  'learned_64_by_32': {
    'variance_type': 'learned_range',
    'beta_schedule': 'squaredcos_cap_v2',
    'prediction_type': 'v_prediction',
  }
}


def ours(workdir):
  """(recipe, weights) of a run."""
  config = recipe.resolve(None, workdir, {'parallel.data': '1'})
  *_, params = runs.restore(config, build.mesh(config), workdir)
  return config, params


@pytest.mark.parametrize('name', NETWORKS)
def test_outputs_are_the_same_both_ways(name, tmp_path):
  unet = NETWORKS[name]
  model = golden.random_model(unet)
  scheduler = diffusers.DDPMScheduler(**SCHEDULERS.get(name, {}))
  theirs, run, back = (tmp_path / x for x in ('theirs', 'run', 'back'))
  diffusers.DDPMPipeline(model, scheduler).save_pretrained(theirs)
  main.run(['--mode=convert', f'--input={theirs}', f'--output={run}'])
  main.run(['--mode=convert', f'--workdir={run}', f'--output={back}'])
  config, params = ours(run)
  x = golden.noise(5, (3, *recipe.shape(config)))
  t = np.array([0, 321, 999])
  there = golden.answer(model, x, t)
  here = jax.jit(build.network(config).apply)({'params': params}, x, t + 1)
  again = diffusers.DDPMPipeline.from_pretrained(back)
  difference = np.max(np.abs(here - there)) / np.max(np.abs(there))
  print(f'{name}: {difference:.1e} of its scale')
  # Sums of up to 1152 float32 products, in another order.
  assert difference < 1e-4
  for name, p in model.state_dict().items():
    assert torch.equal(again.unet.state_dict()[name], p), name
  for key, value in scheduler.config.items():
    # Its spacing is ours by now, and of fewer steps than T.
    if not key.startswith('_') and key != 'timestep_spacing':
      assert again.scheduler.config[key] == value, key


LABELS = {**golden.MODELS['label'][0], 'block_out_channels': [16, 32]}


def test_a_model_with_classes_is_the_same_both_ways(tmp_path):
  model = golden.random_model({**LABELS, 'num_class_embeds': 11})
  theirs, run, back = (tmp_path / x for x in ('theirs', 'run', 'back'))
  diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(
    theirs
  )
  main.run(
    [
      *('--mode=convert', f'--input={theirs}', f'--output={run}'),
      '--config.condition.classes=10',
    ]
  )
  main.run(['--mode=convert', f'--workdir={run}', f'--output={back}'])
  again = diffusers.DDPMPipeline.from_pretrained(back).unet
  for name, p in model.state_dict().items():
    assert torch.equal(again.state_dict()[name], p), name
  config, params = ours(run)
  same_for_all_classes(config, params, model)


def same_for_all_classes(config, params, model):
  """And for no class, at several t."""
  classes = config.condition.classes
  labels = np.tile(np.arange(classes + 1), 3)
  t = np.repeat([0, 321, 999], classes + 1)
  x = golden.noise(5, (1, *recipe.shape(config))).repeat(len(t), 0)
  there = golden.answer(model, x, t, labels)
  here = jax.jit(build.network(config).apply)(
    {'params': params}, x, t + 1, np.where(labels == classes, -1, labels)
  )
  scale = np.max(np.abs(there))
  difference = np.max(np.abs(here - there)) / scale
  print(f'{classes} classes: {difference:.1e} of its scale')
  assert difference < 1e-5
  # They differ by more than that.
  apart = there[: classes + 1] - there[:1]
  assert np.min(np.max(np.abs(apart), axis=(1, 2, 3))[1:]) > 1e-3 * scale


def random_label_run(workdir, **changes):
  """A run told a class, its condition narrower than the time embedding."""
  config = recipe.shipped('digits')
  recipe.override(
    config,
    {
      'condition.name': 'label',
      'condition.classes': '10',
      'condition.width': '12',
      'model.channels': '16',
      'parallel.data': '1',
      **changes,
    },
  )
  shapes = jax.eval_shape(lambda: build.init_state(config)).params
  leaves, tree = jax.tree.flatten(shapes)
  spread = [np.prod(x.shape[:-1]) ** -0.5 for x in leaves]
  params = jax.tree.unflatten(
    tree,
    [
      golden.noise(i, x.shape) * np.float32(s)
      for i, (x, s) in enumerate(zip(leaves, spread, strict=True))
    ],
  )
  workdir.mkdir()
  pretrained.save(config, build.mesh(config), params, workdir)
  return config, params


@pytest.mark.parametrize('variance', ['beta', 'learned_range'])
def test_a_run_told_a_class_is_the_same_network_there(variance, tmp_path):
  run, out = tmp_path / 'run', tmp_path / 'out'
  config, params = random_label_run(run, **{'model.variance': variance})
  main.run(['--mode=convert', f'--workdir={run}', f'--output={out}'])
  unet = diffusers.DDPMPipeline.from_pretrained(out).unet
  assert unet.config.num_class_embeds == 11
  same_for_all_classes(config, params, unet.eval())
  with pytest.raises(ValueError, match='class_labels should be provided'):
    diffusers.DDPMPipeline.from_pretrained(out)(num_inference_steps=1)


@pytest.mark.parametrize('guidance', [1.0, 3.0])
@pytest.mark.parametrize('variance', ['beta', 'learned_range'])
def test_the_advice_after_an_export_draws_each_class(
  variance, guidance, tmp_path, monkeypatch
):
  run, out = tmp_path / 'run', tmp_path / 'out'
  config, params = random_label_run(
    run,
    **{
      'schedule.T': '20',
      'model.variance': variance,
      'loss.name': 'simple' if variance == 'beta' else 'hybrid',
      'sampler.guidance': str(guidance),
    },
  )
  main.run(['--mode=convert', f'--workdir={run}', f'--output={out}'])
  code = card.snippet(recipe.flatten(config), out)
  if guidance != 1:
    for line in ('none =', 'without =', 'out'):
      assert f'  # {line}' in code
      code = code.replace(f'  # {line}', f'  {line}')
  seen = []
  step = diffusers.DDPMScheduler.step

  def spy(self, model_output, t, x):
    seen.append([model_output.clone(), int(t), x.clone()])
    return step(self, model_output, t, x)

  monkeypatch.setattr(diffusers.DDPMScheduler, 'step', spy)
  found = {'w': guidance}
  try:
    exec(code, found)
  finally:
    torch.set_grad_enabled(True)
  images = found['images']
  assert images.shape == (10, 1, 8, 8)
  assert 0 <= images.min() < images.max() <= 1
  assert [t for _, t, _ in seen] == [*range(19, -1, -1)]
  p = build.sampler(config)
  params = jax.device_put(params)
  network = jax.jit(p.denoiser(params, np.arange(10)).network)
  for i in (0, 10, 19):
    there, t, x = seen[i]
    x, there = (a.permute(0, 2, 3, 1).numpy() for a in (x, there))
    here = network(x, np.full(10, t + 1))
    scale = np.max(np.abs(there))
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-5 * scale)


def test_a_trained_run_is_the_same_network_there(tmp_path):
  workdir = tmp_path / 'run'
  main.run([*conftest.UNET, '--config.steps=20', f'--workdir={workdir}'])
  main.run(
    ['--mode=convert', f'--workdir={workdir}', f'--output={tmp_path}/out']
  )
  pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / 'out')
  config, params = ours(workdir)
  x, t = golden.noise(6, (2, 8, 8, 1)), np.array([3, 700])
  here = jax.jit(build.network(config).apply)({'params': params}, x, t + 1)
  there = golden.answer(pipeline.unet.eval(), x, t)
  np.testing.assert_allclose(here, there, atol=1e-4 * np.max(np.abs(there)))
  drawn = pipeline(num_inference_steps=2, output_type='np').images
  assert drawn.shape == (1, 8, 8, 1)


@pytest.mark.parametrize('zero', ['false', 'true'])
@pytest.mark.parametrize('name', schedules.__all__)
def test_every_schedule_is_written_so_that_it_comes_out_the_same(name, zero):
  config = recipe.shipped('digits')
  recipe.override(
    config,
    {
      'model.predict': 'v',
      'schedule.name': name,
      'schedule.T': '50',
      'schedule.zero_terminal_snr': zero,
    },
  )
  beta = np.asarray(build.schedule(config).beta[1:])
  _, scheduler = fields.from_recipe(recipe.flatten(config), beta)
  there = diffusers.DDPMScheduler.from_config(scheduler).betas.numpy()
  # Rescaled in float32 there: ᾱ is off by its rounding, and β by two of them.
  atol = 2e-6 if zero == 'true' else 0
  np.testing.assert_allclose(there, beta, rtol=1e-5, atol=atol)


def noise_of(keys, t, shape):
  """What a step at time t draws from these keys."""
  at_t = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
  return np.asarray(process.normal(at_t, shape))


def test_a_chain_of_1000_steps_is_the_same(tmp_path):
  """`ancestral` with its own noise, which the other is given."""
  model = golden.random_model(golden.MODELS['rgb'][0])
  scheduler = diffusers.DDPMScheduler(variance_type='fixed_large')
  diffusers.DDPMPipeline(model, scheduler).save_pretrained(tmp_path / 'in')
  main.run(
    ['--mode=convert', f'--input={tmp_path}/in', f'--output={tmp_path}/run']
  )
  config, params = ours(tmp_path / 'run')
  p = build.sampler(config)
  keys, x_T = sampling.noise(config, 0, jnp.arange(2))
  x_0, *_ = samplers.sample(p.step, p.denoiser(params), keys, x_T)
  x = np.asarray(x_T)
  for t in scheduler.timesteps.tolist():
    out = golden.answer(model, x, [t] * 2)
    x = golden.step(scheduler, out, x, t, noise_of(keys, t + 1, x.shape[1:]))
  difference = np.max(np.abs(x - x_0))
  print(f'a chain of 1000 steps: {difference:.1e}')
  assert difference < 1e-3


def answering(out, prediction, schedule, **fields_):
  """A denoiser whose network says `out`."""
  predict = getattr(predictions, fields.PREDICTIONS[prediction])
  network = lambda x, t: jnp.asarray(out)  # noqa: E731
  return denoisers.Denoiser(schedule, network, predict, **fields_)


@pytest.mark.parametrize('clip', [True, False])
@pytest.mark.parametrize('spacing', ['trailing', 'leading'])
@pytest.mark.parametrize('eta', [0.0, 0.3, 1.0])
@pytest.mark.parametrize('prediction', fields.PREDICTIONS)
def test_ten_strided_ddim_steps_are_the_same(prediction, eta, spacing, clip):
  ours = {'trailing': spacings.linear, 'leading': spacings.leading}
  table = schedules.stride(schedules.linear(), 10, ours[spacing])
  scheduler = diffusers.DDIMScheduler(
    prediction_type=prediction, timestep_spacing=spacing, clip_sample=clip
  )
  scheduler.set_timesteps(10)
  x = golden.noise(1, (2, 4, 4, 3))
  out = golden.noise(2, x.shape)
  keys = jax.random.split(jax.random.key(0), 2)
  z, *nchw = (
    torch.tensor(np.asarray(a)).permute(0, 3, 1, 2)
    for a in (process.normal(keys, x.shape[1:]), out, x)
  )
  for k, t in zip(range(10, 0, -1), scheduler.timesteps.tolist(), strict=True):
    assert table.time[k] == t + 1
    denoiser = answering(out, prediction, table, clip=clip)
    here, _ = samplers.ddim(denoiser, keys, x, jnp.array(k), eta=eta)
    there = scheduler.step(
      *(nchw[0], t, nchw[1]),
      eta=eta,
      # ε is what x_t and the clipped x̂_0 make it, as in ours.
      use_clipped_model_output=True,
      variance_noise=z,
    ).prev_sample.permute(0, 2, 3, 1)
    # Its tables are float32: 1 - ᾱ is off by 2e-4 of itself at its t = 0.
    np.testing.assert_allclose(
      here, there, atol=1e-4 * np.max(np.abs(there.numpy()))
    )


@pytest.mark.parametrize('variance', fields.VARIANCES)
@pytest.mark.parametrize('prediction', fields.PREDICTIONS)
def test_a_step_in_double_precision_tables_is_the_same(prediction, variance):
  """What differs from a plain DDPMScheduler is the rounding of its tables."""
  scheduler = diffusers.DDPMScheduler(
    prediction_type=prediction, variance_type=variance
  )
  betas = np.linspace(1e-4, 0.02, 1000)
  scheduler.alphas_cumprod = torch.tensor(np.cumprod(1 - betas))
  scheduler.one = torch.tensor(1.0, dtype=torch.float64)
  x = golden.noise(1, (2, 4, 4, 3))
  keys = jax.random.split(jax.random.key(0), 2)
  z = np.asarray(process.normal(keys, x.shape[1:]))
  width = 6 if variance == 'learned_range' else 3
  out = golden.noise(2, (*x.shape[:-1], width))
  for t in golden.TIMES:
    of_variance = getattr(variances, fields.VARIANCES[variance])
    denoiser = answering(
      out, prediction, schedules.linear(), variance=of_variance
    )
    here, _ = samplers.ancestral(denoiser, keys, x, jnp.array(t + 1))
    there = golden.step(scheduler, out, x, t, z)
    np.testing.assert_allclose(here, there, atol=2e-6)


def test_pickles_of_tensors_are_read_and_others_are_not(tmp_path):
  model = golden.random_model(golden.MODELS['rgb'][0])
  model.save_pretrained(tmp_path / 'in', safe_serialization=False)
  diffusers.DDPMScheduler().save_pretrained(tmp_path / 'in')
  weights = tmp_path / 'in' / 'diffusion_pytorch_model.bin'
  convert = ['--mode=convert', f'--input={tmp_path}/in']
  main.run([*convert, f'--output={tmp_path}/run'])
  _, params = ours(tmp_path / 'run')
  np.testing.assert_array_equal(
    params['conv_in']['bias'], model.conv_in.bias.detach().numpy()
  )
  whole = weights.read_bytes()
  torch.save([1, 2], tmp_path / 'list.bin')
  for other in (
    pickle.dumps(pathlib.Path('x')),
    whole[: len(whole) // 2],
    b'',
    (tmp_path / 'list.bin').read_bytes(),
  ):
    weights.write_bytes(other)
    with pytest.raises(errors.UserError, match='does not contain only weights'):
      main.run([*convert, f'--output={tmp_path}/other'])


def test_a_model_of_the_hub_that_is_cached_needs_no_network(tmp_path):
  """A process of its own, as the hub reads its environment once."""
  cache = tmp_path / 'hub' / 'models--golden--rgb'
  shutil.copytree(golden.FOLDER / 'rgb', cache / 'snapshots' / ('0' * 40))
  (cache / 'refs').mkdir()
  (cache / 'refs' / 'main').write_text('0' * 40)
  code = (
    'from ddpm_jax.interop import files; '
    "print(files.read_model(files.locate('golden/rgb')).weights.name)"
  )
  root = pathlib.Path(__file__).parents[1]
  env = {'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': root}
  process = subprocess.run(
    [sys.executable, '-c', code],
    env=os.environ | {key: str(value) for key, value in env.items()},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=True,
  )
  assert process.stdout == 'diffusion_pytorch_model.safetensors\n'


def test_a_ckpt_has_the_recipe_that_is_named(tiny_run, tmp_path):
  workdir, _ = tiny_run
  _, params = ours(workdir)
  tensors = interop.from_params(
    jax.device_get(params), interop.PYTORCH_DIFFUSION
  )
  path = tmp_path / 'model-200.ckpt'
  torch.save({k: torch.tensor(x) for k, x in tensors.items()}, path)
  convert = ['--mode=convert', f'--input={path}', f'--output={tmp_path}/run']
  main.run([*convert, *conftest.UNET])
  _, again = ours(tmp_path / 'run')
  chex.assert_trees_all_equal(params, again)


@pytest.mark.parametrize('prediction', ['sample', 'v_prediction'])
def test_a_step_from_a_zero_terminal_snr_is_the_same(prediction):
  scheduler = diffusers.DDPMScheduler(
    prediction_type=prediction, rescale_betas_zero_snr=True
  )
  table = schedules.zero_terminal_snr(schedules.linear())
  x, out = golden.noise(1, (2, 4, 4, 3)), golden.noise(2, (2, 4, 4, 3))
  keys = jax.random.split(jax.random.key(0), 2)
  z = np.asarray(process.normal(keys, x.shape[1:]))
  for t in (999, 998, 500, 0):
    denoiser = answering(out, prediction, table, variance=variances.beta_tilde)
    here, _ = samplers.ancestral(denoiser, keys, x, jnp.array(t + 1))
    there = golden.step(scheduler, out, x, t, z)
    # Its tables are float32, and ᾱ near T is next to nothing.
    np.testing.assert_allclose(here, there, atol=1e-3)


@pytest.mark.parametrize(
  ('kind', 'defaults'),
  [
    ('UNet2DModel', fields.UNET_DEFAULTS),
    ('DDPMScheduler', fields.SCHEDULER_DEFAULTS),
  ],
)
def test_absent_fields_mean_what_the_installed_version_says(kind, defaults):
  function = getattr(diffusers, kind).__init__
  for field, parameter in inspect.signature(function).parameters.items():
    if field != 'self':
      assert defaults[field] == parameter.default, field


def test_a_learned_variance_is_taken_for_a_variance_and_not_its_log():
  """Why `learned` is not written."""
  scheduler = diffusers.DDPMScheduler(variance_type='learned')
  x, out = golden.noise(1, (1, 2, 2, 3)), golden.noise(2, (1, 2, 2, 6))
  out[..., 3:] = 0.25
  mean, moved = (golden.step(scheduler, out, x, 500, z) for z in (0.0, 1.0))
  np.testing.assert_allclose(moved - mean, 0.5, rtol=1e-5)


def test_golden_is_what_the_script_makes():
  for seed, (name, (unet, _)) in enumerate(golden.MODELS.items()):
    model = golden.random_model(unet, seed)
    expected = np.load(pathlib.Path(golden.FOLDER) / name / 'expected.npz')
    here = golden.answer(
      model, expected['x'], expected['t'], expected.get('labels')
    )
    np.testing.assert_allclose(here, expected['out'], rtol=0, atol=1e-5)
