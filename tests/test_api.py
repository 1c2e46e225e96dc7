"""The Python API: the same numbers as the command line, errors, no output."""

import concurrent.futures
import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_diffusers as golden

import ddpm_jax
from ddpm_jax import main
from ddpm_jax.data import store
from ddpm_jax.diffusion import denoiser as denoisers

KEYS = dict(
  batch_size=8,
  steps=3,
  model={'name': 'two_convolutions.network'},
  sampler={'steps': 4},
  log={'every': 1},
)


@pytest.fixture(scope='module')
def run(tiny_run):
  return ddpm_jax.load(tiny_run[0])


def images(n=20, side=8, channels=1):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (n, side, side, channels), np.uint8)


def test_samples_are_those_of_the_program(run, tiny_run, tmp_path, capfd):
  output = tmp_path / 'a.npz'
  args = ['--mode=sample', f'--workdir={tiny_run[0]}', '--num_samples=3']
  args += ['--seed=7', '--config.sampler.name=ddim']
  main.run([*args, '--config.sampler.steps=5', f'--output={output}'])
  capfd.readouterr()
  drawn = run.sample(3, seed=7, steps=5, sampler='ddim')
  assert capfd.readouterr() == ('', '')
  with np.load(output) as file:
    np.testing.assert_array_equal(drawn, file['images'])
  assert drawn.dtype == np.uint8
  assert drawn.shape == (3, 8, 8, 1)


def test_another_seed_is_drawn_by_the_same_program(run):
  first = run.sample(2, seed=1)
  compiled = len(run._compiled)
  others = run.sample(2, seed=2)
  assert len(run._compiled) == compiled
  assert np.any(first != others)


def test_the_bound_is_that_of_the_program(run, tiny_run):
  data = images(4)
  bits = run.bits_per_dim(data, draws=3)
  assert bits.shape == (4,)
  assert np.all(bits > 0)
  alone = run.bits_per_dim(data[:1], draws=3)
  np.testing.assert_allclose(alone, bits[:1], rtol=1e-5)  # float32 sums
  batches = ddpm_jax.load(tiny_run[0], evaluate={'batch_size': 3})
  found = batches.bits_per_dim(data, draws=3)
  np.testing.assert_allclose(found, bits, rtol=1e-5)
  exact = run.bits_per_dim(data[:2], draws=0)
  assert np.all(np.isfinite(exact))


def test_the_denoiser_is_pure(run):
  denoiser = run.denoiser()
  x = jnp.ones((2, 8, 8, 1))

  @jax.jit
  def loss(x):
    return jnp.sum(denoisers.x0_hat(denoiser, x, jnp.array([3, 900])))

  assert jax.grad(loss)(x).shape == x.shape
  assert denoiser.schedule.T == 1000


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(count=0), 'count=0'),
    (dict(count=1, steps=0), r'sampler\.steps=0'),
    (dict(count=1, steps=2000), r'sampler\.steps=2000'),
    (dict(count=1, sampler='dim'), "did you mean 'ddim'"),
    (dict(count=1, seed=-1), 'seed=-1'),
    (dict(count=1, prompt='a seven'), 'text'),
    (dict(count=1, label=7), 'label'),
    (dict(count=1, guidance=3.0), 'guidance'),
  ],
)
def test_bad_settings_of_samples_are_errors(run, settings, message):
  with pytest.raises(ddpm_jax.UserError, match=message) as error:
    run.sample(**settings)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (images(2).astype(np.float32), 'float32'),
    (images(2, side=4), r'\(2, 4, 4, 1\)'),
    (images(0), r'\(0, 8, 8, 1\)'),
  ],
)
def test_bad_images_have_no_bound(run, data, message):
  with pytest.raises(ddpm_jax.UserError, match=message):
    run.bits_per_dim(data)


def test_an_average_of_noise_is_a_warning(tmp_path, caplog):
  ddpm_jax.train(
    'configs/digits.py',
    data=images(),
    workdir=tmp_path / 'run',
    num_samples=1,
    **KEYS,
  )
  assert 'after 3 steps 97% of the EMA weights' in caplog.text


def test_an_array_is_trained_on_and_resumed(tmp_path, capfd):
  data, folder = images(side=6, channels=3), tmp_path / 'mine'
  run = ddpm_jax.train(
    'configs/digits.py', data=data, workdir=folder, num_samples=4, **KEYS
  )
  assert capfd.readouterr() == ('', '')
  assert run.step == 3
  assert run.sample(2, steps=2).shape == (2, 6, 6, 3)
  assert (folder / 'samples.png').exists()
  opened = ddpm_jax.load(folder)
  for a, b in zip(
    jax.tree.leaves(opened.params), jax.tree.leaves(run.params), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  more = ddpm_jax.train(
    'configs/digits.py', data=data, workdir=folder, **KEYS | {'steps': 5}
  )
  assert more.step == 5
  with pytest.raises(ddpm_jax.UserError, match='are not those'):
    ddpm_jax.train('configs/digits.py', data=255 - data, workdir=folder, **KEYS)


def test_a_thread_trains_too(tmp_path):
  """Signals are heard by the main thread alone: there Ctrl-C is no stop."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    run = pool.submit(
      ddpm_jax.train,
      'configs/digits.py',
      data=images(),
      workdir=tmp_path / 'run',
      num_samples=1,
      **KEYS,
    ).result()
  assert run.step == 3


def test_an_interrupt_saves_and_returns_the_run(tmp_path):
  """And Python's own handler is back."""
  data = images()

  source = store.from_arrays(data, np.full(20, -1, np.int32))
  seen = []

  def gather(indices):
    seen.append(len(indices))
    if len(seen) == 40:
      os.kill(os.getpid(), signal.SIGINT)
    return source.gather(indices)

  run = ddpm_jax.train(
    'configs/digits.py',
    data=dataclasses.replace(source, gather=gather),
    workdir=tmp_path / 'run',
    **KEYS | {'steps': 10_000},
  )
  assert 0 < run.step < 10_000
  assert ddpm_jax.load(tmp_path / 'run').step == run.step
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_program_evaluates_a_run_of_an_array_saved_as_a_file(
  tmp_path, capsys
):
  folder, file = tmp_path / 'mine', tmp_path / 'data.npz'
  np.savez(file, images=images())
  ddpm_jax.train(
    'configs/digits.py', data=images(), workdir=folder, num_samples=1, **KEYS
  )
  args = ['--mode=evaluate', f'--workdir={folder}']
  args += ['--config.evaluate.images=2', '--config.evaluate.draws=2']
  main.run([*args, f'--config.data.path={file}'])
  assert 'bits/dim' in capsys.readouterr().out


def test_labels_and_sources_are_data(tmp_path):
  data = {'images': images(), 'labels': np.arange(20) % 2}
  run = ddpm_jax.train(
    'configs/digits.py',
    data=data,
    workdir=tmp_path / 'labels',
    condition={'name': 'label'},
    **KEYS,
  )
  drawn = run.sample(2, label=1, guidance=2.0)
  assert drawn.shape == (2, 8, 8, 1)
  assert np.isfinite(run.bits_per_dim(drawn, label=1, draws=2)).all()
  with pytest.raises(ddpm_jax.UserError, match='label='):
    run.bits_per_dim(drawn)
  source = store.from_arrays(images(), np.full(20, -1, np.int32))
  run = ddpm_jax.train(
    'configs/digits.py', data=source, workdir=tmp_path / 'source', **KEYS
  )
  assert run.step == 3


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(data=images().astype(float)), 'float64'),
    (dict(data={'images': images(), 'label': 1}), 'label'),
    (dict(data={'pth': 'a'}), r'config\.data\.pth'),
    (dict(modle={'channels': 3}), r'config\.modle\.channels'),
    (dict(steps='many'), 'steps'),
    (dict(config='configs/digitz.py'), 'digits'),
    (dict(schedule={'beta_T': 0.1}), 'beta_T=0.1 is not used'),
  ],
)
def test_bad_training_is_an_error_and_leaves_nothing(
  tmp_path, settings, message
):
  folder = tmp_path / 'run'
  config = settings.pop('config', 'configs/digits.py')
  with pytest.raises(ddpm_jax.UserError, match=message) as error:
    ddpm_jax.train(config, workdir=folder, **{**KEYS, **settings})
  assert '\n' not in str(error.value)
  assert not folder.exists()


def test_a_recipe_of_python_is_that_of_the_command_line(tmp_path):
  config = ddpm_jax.get_config('configs/digits.py', schedule={'T': 100})
  assert config.sampler.steps == 100  # which follows T
  again = ddpm_jax.get_config(config, sampler={'steps': 10})
  assert (again.sampler.steps, config.sampler.steps) == (10, 100)


def test_64_bit_numbers_are_refused(tiny_run, tmp_path):
  with jax.enable_x64(True):
    with pytest.raises(ddpm_jax.UserError, match='float32'):
      ddpm_jax.load(tiny_run[0])
    with pytest.raises(ddpm_jax.UserError, match='float32'):
      ddpm_jax.train('configs/digits.py', workdir=tmp_path / 'run')


def test_what_is_no_run_is_an_error(tiny_run, tmp_path):
  with pytest.raises(ddpm_jax.UserError, match='no such folder'):
    ddpm_jax.load(tmp_path / 'nowhere')
  with pytest.raises(ddpm_jax.UserError, match='no run in'):
    ddpm_jax.load(tmp_path)
  with pytest.raises(ddpm_jax.UserError, match=r'model\.channels'):
    ddpm_jax.load(tiny_run[0], model={'channels': 3})
  with pytest.raises(ddpm_jax.UserError, match='these keys differ'):
    ddpm_jax.load(tiny_run[0], config='configs/cifar.py')


def test_a_folder_of_diffusers_is_loaded(tmp_path):
  run, folder = tmp_path / 'run', tmp_path / 'diffusers'
  args = [x for x in conftest.UNET if 'checkpoint' not in x]
  main.run([*args, '--config.steps=1', f'--workdir={run}'])
  main.run(['--mode=convert', f'--workdir={run}', f'--output={folder}'])
  want = ddpm_jax.load(run)
  got = ddpm_jax.load(folder)
  assert got.workdir is None
  for a, b in zip(
    jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(got.sample(2, steps=3), want.sample(2, steps=3))


def test_a_model_of_diffusers_with_classes_is_loaded():
  folder = golden.FOLDER / 'label'
  run = ddpm_jax.load(folder, condition={'classes': 3})
  assert run.sample(2, steps=2, label=1, guidance=2.0).shape[0] == 2
  with pytest.raises(ddpm_jax.UserError, match='num_class_embeds=4'):
    ddpm_jax.load(folder)
  with pytest.raises(
    ddpm_jax.UserError, match=r'weights=raw: .* not a workdir'
  ):
    ddpm_jax.load(folder, weights='raw')


def test_a_folder_of_diffusers_without_sub_folders_is_loaded(tmp_path):
  for path in (golden.FOLDER / 'rgb').rglob('*'):
    if path.is_file():
      shutil.copy(path, tmp_path)
  assert ddpm_jax.load(tmp_path).workdir is None


def test_a_moved_workdir_is_a_run(run, tiny_run, tmp_path):
  shutil.copytree(tiny_run[0], tmp_path / 'copy')
  copy = ddpm_jax.load(tmp_path / 'copy', step=160, weights='raw')
  assert (copy.step, copy.weights) == (160, 'raw')


def test_to_import_it_is_to_import_neither_JAX_nor_NumPy():
  program = 'import sys, ddpm_jax; print({"jax", "numpy"} & set(sys.modules))'
  found = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert found.stdout.strip() == 'set()'
  assert 'load' in dir(ddpm_jax)
  with pytest.raises(AttributeError):
    ddpm_jax.nothing  # noqa: B018
