"""Pictures show what they are given."""

import numpy as np
from PIL import Image

from ddpm_jax import plots
from ddpm_jax.storage import images


def test_a_grid_has_every_image_in_reading_order():
  tiles = np.arange(5, dtype=np.uint8)[:, None, None, None] * 10
  tiles = np.broadcast_to(tiles, (5, 4, 4, 1))
  grid = images.grid(tiles, columns=3, width=1)
  assert grid.shape == (11, 16, 1)  # 2 rows, 3 columns, borders of 1
  centres = [grid[2 + 5 * (i // 3), 2 + 5 * (i % 3), 0] for i in range(6)]
  assert centres == [0, 10, 20, 30, 40, 255]
  assert grid[0].min() == 255


def test_small_images_are_enlarged_and_large_ones_are_not():
  assert images.grid(np.zeros((64, 8, 8, 1), np.uint8)).shape[1] > 600
  large = images.grid(np.zeros((4, 512, 512, 3), np.uint8))
  assert 1024 < large.shape[1] < 1200


def test_png_files_hold_the_pixels_exactly(tmp_path):
  rng = np.random.default_rng(0)
  for channels in (1, 3):
    image = rng.integers(0, 256, (5, 7, channels), dtype=np.uint8)
    images.save_png(tmp_path / 'a.png', image)
    with Image.open(tmp_path / 'a.png') as file:
      np.testing.assert_array_equal(
        np.asarray(file).reshape(image.shape), image
      )
  assert [p.name for p in tmp_path.iterdir()] == ['a.png']


def test_a_picture_of_a_curve_shows_its_values(tmp_path):
  x = np.arange(1, 100)

  def picture(y):
    plots.save_curve(tmp_path / 'c.png', x, y, 'step', 'loss')
    with Image.open(tmp_path / 'c.png') as file:
      assert file.size == (800, 450)
      return np.asarray(file.convert('RGB')).astype(int)

  falling, rising = picture(1 / x), picture(1 / x[::-1])
  # The axes are the same, and curves are thin.
  differs = np.any(falling != rising, axis=-1)
  assert 0.002 < differs.mean() < 0.05
  blue = [half[..., 2] - half[..., 0] > 50 for half in (falling, rising)]
  top, bottom = slice(0, 225), slice(225, 450)
  assert np.argmax(blue[0][top].any(0)) < np.argmax(blue[0][bottom].any(0))
  assert np.argmax(blue[1][top].any(0)) > np.argmax(blue[1][bottom].any(0))


def test_a_smoothed_curve_lies_on_what_falls_steadily():
  """A median of the past would lie above it, and one cut at the ends too."""
  y = 1 / np.arange(1.0, 301)
  np.testing.assert_array_equal(plots.running_median(y, 20), y)
  noisy = y.copy()
  noisy[100] = 5.0
  assert plots.running_median(noisy, 20).max() == 1.0
  assert plots.running_median(y[:1], 20) == [1.0]


def test_a_point_far_out_is_counted_and_does_not_make_the_others_small(
  tmp_path,
):
  rng = np.random.default_rng(0)
  data = rng.uniform(-1, 1, (2000, 2))
  samples = data.copy()
  samples[7] = 50.0
  limit = plots.scatter_limit([data])
  assert 1.0 < limit < 1.3  # all of the data are inside

  def picture(name, samples):
    path = tmp_path / name
    sets = {'': [data, samples]}
    plots.save_scatter(path, sets, ['data', 'samples'], [data])
    with Image.open(path) as file:
      return np.asarray(file).astype(int)

  far = picture('far.png', samples)
  dark = [(half < 250).sum() for half in np.split(far, 2, axis=1)]
  assert 0.9 < dark[1] / dark[0] < 1.1
  # What is drawn is the same without the point: the count is not.
  near = picture('near.png', np.delete(samples, 7, axis=0))
  assert far.shape == near.shape
  assert np.any(far != near)
