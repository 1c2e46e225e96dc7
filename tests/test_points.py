"""Points of the plane: the same mathematics, other data."""

import numpy as np
import pytest
from PIL import Image

from configs import swiss_roll
from ddpm_jax import dataset
from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax import previews
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import spacings

SETS = ['swiss_roll', 'two_moons', 'eight_gaussians']


@pytest.mark.parametrize('name', SETS)
def test_every_set_is_centred_and_of_variance_1(name):
  c = swiss_roll.get_config(name)
  source = dataset.source(c)
  points = source.gather(np.arange(len(source)))['image']
  assert points.shape == (10_000, 2)
  assert points.dtype == np.float32
  np.testing.assert_allclose(points.mean(0), 0, atol=1e-5)
  assert points.std() == pytest.approx(1, abs=1e-5)
  assert len(np.unique(points, axis=0)) > 9_990


def test_eight_gaussians_are_eight():
  c = swiss_roll.get_config('eight_gaussians')
  points = dataset.source(c).gather(np.arange(10_000))['image']
  angle = np.arctan2(*points.T) / (np.pi / 4)
  counts = np.bincount(np.round(angle).astype(int) % 8, minlength=8)
  assert counts.min() > 1100
  assert np.abs(angle - np.round(angle)).mean() < 0.1


def test_points_train_and_are_drawn_and_sampled(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(previews, 'POINTS', 200)
  workdir = tmp_path / 'roll'
  main.run([
    *('--config=configs/swiss_roll.py', f'--workdir={workdir}'),
    *('--config.steps=30', '--config.schedule.T=40'),
    *('--config.schedule.beta_T=0.4', '--config.batch_size=64'),
    *('--config.log.pictures_every=15', '--config.model.channels=16'),
    '--config.model.blocks=1',
  ])  # fmt: skip
  out, err = capsys.readouterr()
  assert out.count('energy distance') == 2  # after half of the steps, and all
  assert err.count('compiling the sampler\n') == 1
  for name in ('samples_15.png', 'progress_15.gif', 'samples.png'):
    assert (workdir / name).exists()
  assert not (workdir / 'samples_30.png').exists()
  with Image.open(workdir / 'progress.gif') as gif:
    assert gif.n_frames >= 8  # two of so few times may be one
  with Image.open(workdir / 'progress.png') as png:
    assert png.size[0] > 1000
  sample = ['--mode=sample', f'--workdir={workdir}', '--num_samples=13']
  main.run(sample)
  points = np.load(workdir / 'samples_seed0_step30_ancestral40.npz')['images']
  assert points.shape == (13, 2)
  assert points.dtype == np.float32
  assert np.abs(points).max() > 1  # nothing is clipped
  for args, message in (
    ([*sample, f'--output={tmp_path / "folder"}'], 'npz'),
    (['--mode=evaluate', f'--workdir={workdir}'], 'points'),
  ):
    with pytest.raises(errors.UserError, match=message):
      main.run(args)


@pytest.mark.parametrize('spacing', [spacings.quadratic, spacings.leading])
def test_both_rows_of_a_picture_are_of_the_same_times(spacing):
  """q at the t that p's network is told, whatever the spacing."""
  short = schedules.stride(schedules.linear(1000), 50, spacing)
  steps, times = previews.preview_times(short)
  assert steps[0] == 50
  assert steps[-1] == times[-1] == 0
  assert times == [spacing(1000, 50)[k] for k in steps]
  if spacing is spacings.quadratic:
    assert times[steps.index(10)] == 40


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (['--config.data.points=swissroll'], "did you mean 'swiss_roll'"),
    (['--config.data.image_size=8'], 'channels=2'),
    (['--config.model.name=unet'], 'unet is for images'),
    (['--config.data.flip=true'], 'no left and right'),
  ],
)
def test_what_does_not_fit_is_refused(changes, message, tmp_path):
  args = ['--config=configs/swiss_roll.py', f'--workdir={tmp_path / "x"}']
  with pytest.raises(errors.UserError, match=message):
    main.run([*args, *changes])


def test_points_have_two_coordinates_and_no_pixels():
  c = swiss_roll.get_config()
  c.data.channels = 3
  with pytest.raises(errors.UserError, match='no pixels and 2 coordinates'):
    dataset.source(c)
