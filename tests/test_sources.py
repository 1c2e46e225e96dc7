"""Files of every kind become the pixels that they show, or a clear error."""

import json
import logging
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL import features
from sklearn import datasets

from configs import digits
from ddpm_jax import errors
from ddpm_jax import inputs
from ddpm_jax.data import decode
from ddpm_jax.data import image_folder
from ddpm_jax.data import sources
from ddpm_jax.data import store
from ddpm_jax.data import unresized


def everything(source):
  return source.gather(np.arange(len(source)))


def folder(path, size=(8, 8), channels=3, max_unreadable=0):
  return sources.folder(
    path=str(path),
    image_size=size,
    channels=channels,
    max_unreadable=max_unreadable,
  )


def arrays(path, size=(8, 8), channels=3):
  return sources.arrays(path=str(path), image_size=size, channels=channels)


def noise(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels=None, **kwargs):
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = noise(8, 8, 3) if pixels is None else pixels
  Image.fromarray(pixels).save(path, **kwargs)


@pytest.fixture(params=['once', 'late'])
def when(request, monkeypatch):
  """Decoding once, then at every gather."""
  if request.param == 'late':
    monkeypatch.setattr(store, 'MEMORY', 0)
  return request.param


# Names of datasets, and what importing them costs.


def test_importing_sources_imports_nothing_heavy():
  code = (
    'import sys, ddpm_jax.data.sources; print([m for m in ("jax", "sklearn", '
    '"tensorflow_datasets", "tensorflow") if m in sys.modules])'
  )
  run = [sys.executable, '-c', code]
  assert subprocess.check_output(run, text=True).strip() == '[]'


# Digits.


def test_digits_are_those_of_sklearn():
  original = datasets.load_digits()
  batch = everything(sources.digits(image_size=(8, 8), channels=1))
  assert batch['image'].shape == (1797, 8, 8, 1)
  assert batch['image'].dtype == np.uint8
  assert batch['label'].dtype == np.int32
  # Half a gray level of 255 is a thirtieth of one of 16.
  np.testing.assert_allclose(
    batch['image'][..., 0] * (16 / 255), original.images, atol=0.5 * 16 / 255
  )
  np.testing.assert_array_equal(batch['label'], original.target)


def test_digits_of_another_size_are_refused():
  with pytest.raises(errors.UserError, match=r'image_size=8 .*channels=1'):
    sources.digits(image_size=(32, 32), channels=3)


# Folders: pixels.


@pytest.mark.parametrize('suffix', ['png', 'webp', 'BMP', 'tiff'])
def test_lossless_files_of_the_right_size_keep_their_pixels(tmp_path, suffix):
  pixels = noise(8, 8, 3)
  lossless = {'lossless': True} if suffix == 'webp' else {}
  save(tmp_path / f'a.{suffix}', pixels, **lossless)
  np.testing.assert_array_equal(
    everything(folder(tmp_path))['image'][0], pixels
  )


def test_jpeg_is_close(tmp_path):
  pixels = np.full((8, 8, 3), (200, 100, 50), np.uint8)
  save(tmp_path / 'a.JPG', pixels, quality=95)
  image = everything(folder(tmp_path))['image'][0]
  np.testing.assert_allclose(image.astype(int), pixels.astype(int), atol=4)


@pytest.mark.parametrize(
  'name', ['a.avif', 'a.ppm', 'a.pnm', 'a.jpe', 'a.JFIF']
)
def test_what_Pillow_reads_is_found(tmp_path, name):
  if name.endswith('avif') and not features.check('avif'):
    pytest.skip('this Pillow has no AVIF')
  pixels = np.full((8, 8, 3), (200, 100, 50), np.uint8)
  form = {'jpe': 'JPEG', 'JFIF': 'JPEG'}.get(name.partition('.')[2])
  save(tmp_path / name, pixels, format=form)
  image = everything(folder(tmp_path))['image'][0]
  np.testing.assert_allclose(image.astype(int), pixels.astype(int), atol=6)


def test_gif_gives_its_first_frame(tmp_path):
  frames = [Image.new('RGB', (8, 8), c) for c in ('red', 'blue')]
  frames[0].save(tmp_path / 'a.gif', save_all=True, append_images=frames[1:])
  assert everything(folder(tmp_path))['image'][0, 0, 0].tolist() == [255, 0, 0]


def test_gray_files_become_three_equal_channels(tmp_path):
  pixels = noise(8, 8)
  save(tmp_path / 'a.png', pixels)
  image = everything(folder(tmp_path))['image'][0]
  np.testing.assert_array_equal(image, pixels[..., None].repeat(3, 2))


def test_colours_become_gray_by_their_luma(tmp_path):
  pixels = noise(8, 8, 3)
  save(tmp_path / 'a.png', pixels)
  image = everything(folder(tmp_path, channels=1))['image'][0]
  assert image.shape == (8, 8, 1)
  luma = pixels @ [0.299, 0.587, 0.114]
  np.testing.assert_allclose(image[..., 0], luma, atol=1)  # rounding


def test_16_bit_gray_keeps_its_range(tmp_path):
  gray = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
  for name in ('a.png', 'b.tif'):
    Image.fromarray(gray).save(tmp_path / name)
  for image in everything(folder(tmp_path, channels=1))['image'][..., 0]:
    np.testing.assert_array_equal(image, np.round(gray / 257))


@pytest.mark.parametrize(
  ('largest', 'bits'),
  [(200, 8), (256, 10), (1023, 10), (4095, 12), (4096, 14), (65535, 16)],
)
def test_16_bit_gray_uses_the_bits_that_hold_its_largest_value(
  tmp_path, largest, bits, caplog, when
):
  gray = np.linspace(0, largest, 64).round().reshape(8, 8)
  Image.fromarray(gray.astype(np.uint16)).save(tmp_path / 'a.png')
  # Mode I, and dark: scaled as the others are, not by its own values.
  Image.fromarray((gray // 8).astype(np.int32)).save(tmp_path / 'b.tif')
  save(tmp_path / 'c.png', noise(8, 8))
  source = folder(tmp_path, channels=1)
  images = everything(source)['image'][..., 0]
  scale = 255 / (2**bits - 1)
  np.testing.assert_array_equal(images[0], np.round(gray * scale))
  np.testing.assert_array_equal(images[1], np.round(gray // 8 * scale))
  np.testing.assert_array_equal(images[2], noise(8, 8))
  assert source.max_value == 2**bits - 1
  assert caplog.messages == [
    f'16-bit images: largest value {largest}, taken as {bits} bits '
    f'(0..{2**bits - 1}); --config.data.max_value sets another'
  ]


def deep(path, *largest):
  """Images of 16 bits, image i with this largest value."""
  for i, value in enumerate(largest):
    gray = np.array([[0, value]], np.uint16).repeat(4, 0)
    Image.fromarray(gray).save(path / f'{i:03d}.png')


def deep_folder(path, **options):
  return sources.folder(
    path=str(path),
    image_size=(4, 2),
    channels=1,
    **{'max_unreadable': 1, **options},
  )


def test_a_value_above_the_assumed_bits_is_reported_not_wrapped(
  tmp_path, monkeypatch, caplog
):
  monkeypatch.setattr(decode, 'PROBED', 2)  # the first and the last
  deep(tmp_path, 4095, 4096, 100)
  images = everything(deep_folder(tmp_path))['image']
  assert images[:, 0, 1, 0].tolist() == [255, round(100 * 255 / 4095)]
  assert '001.png (its largest value 4096 is above 4095' in caplog.messages[1]
  assert 'config.data.max_value' in caplog.messages[1]


def test_the_value_that_is_white_can_be_set(tmp_path, caplog):
  deep(tmp_path, 1000, 2000)
  source = deep_folder(tmp_path, max_value=4000)
  assert everything(source)['image'][:, 0, 1, 0].tolist() == [64, 128]
  assert not caplog.messages
  with pytest.raises(errors.UserError, match='more than 0 images'):
    deep_folder(tmp_path, max_value=1500, max_unreadable=0)
  assert any('2000 is above 1500' in line for line in caplog.messages)


@pytest.mark.parametrize('max_value', [0, 4095, 2047])
def test_one_image_is_scaled_by_the_same_rule(tmp_path, max_value):
  deep(tmp_path, 4095)
  file = tmp_path / '000.png'
  c = digits.get_config('paper')
  c.data.update(image_size=(4, 2), max_value=max_value)
  reads = [
    lambda: inputs.read(file, c)[0],
    lambda: inputs.read(tmp_path, c)[0],
    lambda: inputs.fitted(file, decode.upright(file), (4, 2, 1), max_value),
    lambda: everything(unresized.load(tmp_path, max_value)[0])['image'][0],
  ]
  for read in reads:
    if max_value == 2047:
      with pytest.raises(errors.UserError, match=r'above 2047|0 images are un'):
        read()
    else:
      assert np.asarray(read())[0].ravel().tolist() == [0, 255]


def test_16_bits_among_8_that_were_not_looked_at_are_reported(
  tmp_path, monkeypatch, caplog
):
  monkeypatch.setattr(decode, 'PROBED', 2)
  deep(tmp_path, 0, 4095, 0)
  for name in ('000', '002'):
    save(tmp_path / f'{name}.png', noise(4, 2))
  assert len(deep_folder(tmp_path)) == 2
  (line,) = caplog.messages
  assert '001.png (it has 16 bits' in line


def test_16_bit_arrays_are_scaled_by_what_they_hold(caplog):
  array = np.array([[0, 1000, 4095]], np.uint16)[..., None]
  most = decode.probe_arrays(lambda i: array // (2 - i), 2)
  assert most == 4095
  got = decode.fit_array(array, array.shape, most)
  assert got.ravel().tolist() == [0, 62, 255]
  assert decode.probe_arrays(lambda i: array.astype(np.uint8), 2) == 0
  with pytest.raises(ValueError, match='above 1023'):
    decode.fit_array(array, array.shape, 1023)
  assert len(caplog.messages) == 1


def png_of_16_bits(rgb):
  """Pillow cannot write these."""

  def chunk(kind, data):
    code = kind + data
    return struct.pack('>I', len(data)) + code + zlib.crc32(code).to_bytes(4)

  rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in rgb)
  head = struct.pack('>IIBBBBB', *rgb.shape[1::-1], 16, 2, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', head)
    + chunk(b'IDAT', zlib.compress(rows))
    + chunk(b'IEND', b'')
  )


@pytest.mark.parametrize('largest', [4095, 65535])
def test_colours_of_fewer_than_16_bits_are_said_to_be_dark(
  tmp_path, largest, caplog
):
  rgb = np.full((8, 8, 3), largest, np.uint16)
  (tmp_path / 'a.png').write_bytes(png_of_16_bits(rgb))
  image = everything(folder(tmp_path))['image']
  assert np.all(image == largest >> 8)
  assert len(caplog.messages) == (largest == 4095)
  assert all('15 of 255' in line for line in caplog.messages)


def test_floats_and_negative_pixels_are_refused(tmp_path, caplog):
  Image.fromarray(np.ones((4, 2), np.float32)).save(tmp_path / 'a.tif')
  Image.fromarray(np.full((4, 2), -1, np.int32)).save(tmp_path / 'b.tif')
  with pytest.raises(errors.UserError, match='none of the 2 images'):
    deep_folder(tmp_path, max_unreadable=2)
  assert any('floats' in line for line in caplog.messages)
  assert any('more than 16 bits' in line for line in caplog.messages)


def test_a_PGM_of_12_bits_names_its_range_itself(tmp_path, caplog):
  # Dark: no pixel is near 4095.
  gray = np.array([[0, 819], [1638, 0]], '>u2')
  (tmp_path / 'a.pgm').write_bytes(b'P5 2 2 4095\n' + gray.tobytes())
  image = everything(folder(tmp_path, size=(2, 2), channels=1))['image'][0]
  assert image.ravel().tolist() == [0, 51, 102, 0]
  assert not caplog.messages


def test_what_is_transparent_is_white(tmp_path):
  pixels = np.zeros((8, 8, 4), np.uint8)
  pixels[0, :, 3] = 255  # black on top; below, black that cannot be seen
  save(tmp_path / 'rgba.png', pixels)
  save(tmp_path / 'la.png', pixels[..., 2:])
  palette = Image.fromarray((pixels[..., 3] == 0).astype(np.uint8), 'P')
  palette.putpalette([0, 0, 0, 9, 9, 9])
  palette.save(tmp_path / 'palette.png', transparency=1)
  for image in everything(folder(tmp_path))['image']:
    assert (image[0] == 0).all()
    assert (image[1:] == 255).all()


def test_half_transparent_is_half_white(tmp_path):
  save(tmp_path / 'a.png', np.full((8, 8, 4), (0, 0, 0, 128), np.uint8))
  assert (everything(folder(tmp_path))['image'] == 127).all()


def test_palettes_give_their_colours(tmp_path):
  image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8), 'P')
  image.putpalette([x for i in range(64) for x in (i, 2 * i, 255 - i)])
  image.save(tmp_path / 'a.png')
  pixels = everything(folder(tmp_path))['image'][0].reshape(64, 3)
  assert pixels[10].tolist() == [10, 20, 245]


def test_cmyk_gives_its_colours(tmp_path):
  Image.new('CMYK', (8, 8), (0, 255, 255, 0)).save(tmp_path / 'a.jpg')
  red = everything(folder(tmp_path))['image'][0, 4, 4]
  np.testing.assert_allclose(red.astype(int), [255, 0, 0], atol=4)


def test_exif_rotation_is_undone(tmp_path):
  pixels = noise(8, 8, 3)
  exif = Image.Exif()
  exif[0x0112] = 6  # the camera was turned: show it turned clockwise
  save(tmp_path / 'a.png', np.rot90(pixels), exif=exif)
  np.testing.assert_array_equal(
    everything(folder(tmp_path))['image'][0], pixels
  )


# Resizing.


def test_an_image_of_the_right_height_is_only_cropped():
  pixels = noise(8, 13, 3)
  np.testing.assert_array_equal(
    decode.fit_array(pixels, (8, 8, 3)), pixels[:, 2:10]
  )


@pytest.mark.parametrize('size', [(40, 60), (60, 41), (5, 7), (9, 100)])
def test_resizing_covers_then_crops_the_centre(size):
  image = Image.fromarray(noise(*size, 3))
  scale = max(16 / size[1], 12 / size[0])
  full = round(size[1] * scale), round(size[0] * scale)
  left, top = (full[0] - 16) // 2, (full[1] - 12) // 2
  in_two = image.resize(full, Image.Resampling.BICUBIC).crop(
    (left, top, left + 16, top + 12)
  )
  np.testing.assert_allclose(
    decode.fit(image, (12, 16, 3)).astype(int),
    np.asarray(in_two).astype(int),
    atol=1,  # rounding
  )


def test_shrinking_averages():
  checks = np.indices((64, 64)).sum(0)[..., None] % 2 * np.uint8(255)
  shrunk = decode.fit_array(checks.astype(np.uint8), (8, 8, 1))
  np.testing.assert_allclose(shrunk.astype(int), 127, atol=2)


def test_a_strip_is_no_trouble():
  start = time.monotonic()
  assert decode.fit_array(noise(1, 20000, 3), (64, 64, 3)).shape == (64, 64, 3)
  assert time.monotonic() - start < 1  # 5 GB, if all of it were resized


# Folders: labels.


def test_numbers_in_names_of_classes_are_compared_as_numbers(tmp_path):
  for name in [*map(str, range(12)), 'img10', 'img2', 'a', '007', '7']:
    save(tmp_path / name / 'x.png')
  source = folder(tmp_path)
  assert source.class_names == (
    *('0', '1', '2', '3', '4', '5', '6', '007', '7', '8', '9', '10', '11'),
    *('a', 'img2', 'img10'),
  )
  names = [name.split('/')[0] for name in image_folder.find(str(tmp_path))]
  labels = everything(source)['label']
  assert [source.class_names[label] for label in labels] == names


def test_names_of_classes_in_metadata_are_sorted_likewise(tmp_path):
  save(tmp_path / 'a.png')
  save(tmp_path / 'b.png')
  (tmp_path / 'metadata.jsonl').write_text(
    '{"file_name": "a.png", "label": "10"}\n'
    '{"file_name": "b.png", "label": "9"}'
  )
  source = folder(tmp_path)
  assert source.class_names == ('9', '10')
  assert everything(source)['label'].tolist() == [1, 0]


def test_classes_can_be_numbered_in_an_order_of_before(tmp_path):
  for name in ('2', '10', '1'):
    save(tmp_path / name / 'x.png')
  save(tmp_path / 'none.png')
  source = folder(tmp_path)
  old = store.relabelled(source, ('10', '2', '1'))
  assert old.class_names == ('10', '2', '1')
  assert source.class_names == ('1', '2', '10')
  # Files: 1/x, 10/x, 2/x, none.
  assert everything(source)['label'].tolist() == [0, 2, 1, -1]
  assert everything(old)['label'].tolist() == [2, 0, 1, -1]


def test_sub_folders_are_classes_in_alphabetical_order(tmp_path, when):
  for name in ('dog/b.png', 'cat/deep/a.png', 'cat/c.PNG', 'ant/d.jpeg'):
    save(tmp_path / name)
  save(tmp_path / '.hidden/e.png')
  save(tmp_path / 'ant/._d.png')
  (tmp_path / 'dog/notes.txt').write_text('not an image')
  source = folder(tmp_path)
  assert source.class_names == ('ant', 'cat', 'dog')
  assert everything(source)['label'].tolist() == [0, 1, 1, 2]


def test_without_sub_folders_there_are_no_labels(tmp_path):
  save(tmp_path / 'a.png')
  source = folder(tmp_path)
  assert source.class_names == ()
  assert everything(source)['label'].tolist() == [-1]


@pytest.mark.parametrize(
  ('values', 'labels', 'names'),
  [
    (['dog', 'cat', None], [1, 0, -1], ('cat', 'dog')),
    ([2, 0, None], [2, 0, -1], ('0', '1', '2')),
  ],
)
def test_metadata_gives_labels(tmp_path, values, labels, names):
  lines = []
  for name, value in zip('abc', values, strict=True):
    save(tmp_path / f'{name}.png')
    entry = {'file_name': f'{name}.png', 'label': value}
    lines.append(json.dumps({k: v for k, v in entry.items() if v is not None}))
  (tmp_path / 'metadata.jsonl').write_text('\n'.join(lines) + '\n\n')
  source = folder(tmp_path)
  assert everything(source)['label'].tolist() == labels
  assert source.class_names == names


def test_metadata_without_labels_leaves_them_to_the_sub_folders(tmp_path):
  save(tmp_path / 'cat/a.png')
  (tmp_path / 'metadata.jsonl').write_text(
    '{"file_name": "./cat/a.png", "text": "a cat"}'
  )
  assert everything(folder(tmp_path))['label'].tolist() == [0]


@pytest.mark.parametrize(
  'line', ['{"file_name": "clip.mp4", "label": [1]}', '{"label": 1}', '{}']
)
def test_metadata_of_other_files_are_ignored_with_a_warning(
  tmp_path, line, caplog
):
  save(tmp_path / 'cat/a.png')
  (tmp_path / 'metadata.jsonl').write_text(line)
  source = folder(tmp_path)
  assert source.class_names == ('cat',)
  assert everything(source)['label'].tolist() == [0]
  (said,) = caplog.messages
  assert 'metadata.jsonl:1: no image' in said


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    (
      '{"file_name": "a.png", "label": 1}\n{"file_name": "b.png", "label": 1}',
      r":2: no image 'b.png'",
    ),
    ('{"label": 1}\n{"file_name": "a.png"}', ':1: .*file_name'),
    ('{"file_name": ', ':1: not JSON'),
    ('[1]', 'not a JSON object'),
    ('{"file_name": "a.png", "label": 1.5}', 'label 1.5; use an integer'),
    ('{"file_name": "a.png", "label": -2}', 'label -2; use an integer'),
    ('{"file_name": "a.png", "label": true}', 'label True; use an integer'),
    (
      '{"file_name": "a.png", "label": 1}\n'
      '{"file_name": "a.png", "label": "x"}',
      'integers and strings',
    ),
    ('\udcff', ':1: not JSON'),
  ],
)
def test_bad_metadata_is_named_with_its_line(tmp_path, line, message):
  save(tmp_path / 'a.png')
  (tmp_path / 'metadata.jsonl').write_text(line, errors='surrogateescape')
  with pytest.raises(errors.UserError, match=message):
    folder(tmp_path)


# Folders: what is wrong with them.


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('', 'no folder of images'),
    ('missing', 'does not exist'),
    ('file.png', 'is not a folder'),
    ('empty', 'holds no image'),
  ],
)
def test_no_folder_of_images_is_an_error_at_once(tmp_path, name, message):
  save(tmp_path / 'file.png')
  (tmp_path / 'empty').mkdir()
  start = time.monotonic()
  with pytest.raises(errors.UserError, match=message):
    folder(tmp_path / name if name else '')
  assert time.monotonic() - start < 1


def break_some(path):
  """Ten images, four of them broken, each in its own way."""
  for i in range(10):
    save(path / f'{i}.png', np.full((8, 8, 3), i, np.uint8))
  (path / '0.png').write_bytes(b'')
  (path / '4.png').write_text('<html>404</html>')
  half = (path / '5.png').read_bytes()
  (path / '5.png').write_bytes(half[: len(half) // 2])
  (path / '9.png').unlink()
  (path / '9.png').symlink_to('nowhere')


def test_unreadable_files_are_named_and_left_out(tmp_path, caplog):
  break_some(tmp_path)
  with caplog.at_level(logging.WARNING):
    batch = everything(folder(tmp_path, max_unreadable=4))
  assert batch['image'][:, 0, 0, 0].tolist() == [1, 2, 3, 6, 7, 8]
  assert len(caplog.messages) == 4
  for name in ('0.png', '4.png', '5.png', '9.png'):
    assert any(f': {name} (' in line for line in caplog.messages)


def test_late_the_next_readable_image_stands_in(tmp_path, monkeypatch, caplog):
  break_some(tmp_path)
  monkeypatch.setattr(store, 'MEMORY', 0)
  source = folder(tmp_path, max_unreadable=4)
  for _ in range(2):
    batch = everything(source)
    assert batch['image'][:, 0, 0, 0].tolist() == [1, 1, 2, 3, 6, 6, 6, 7, 8, 1]
  assert len(caplog.messages) == 4  # each is named once


def test_too_many_unreadable_files_are_an_error(tmp_path, when):
  break_some(tmp_path)
  with pytest.raises(errors.UserError, match=r'more than 3 .*, \d.png; fix'):
    everything(folder(tmp_path, max_unreadable=3))


def test_nothing_readable_is_an_error(tmp_path, when):
  (tmp_path / 'a.png').write_text('')
  with pytest.raises(errors.UserError, match='none of the 1 images'):
    everything(folder(tmp_path, max_unreadable=10))


def test_decoding_late_equals_decoding_once(tmp_path, monkeypatch):
  for i in range(150):
    save(tmp_path / f'{i % 3}/{i}.png', noise(5 + i % 7, 9, 3, seed=i))
  once = folder(tmp_path)
  monkeypatch.setattr(store, 'MEMORY', 0)
  late = folder(tmp_path)
  indices = np.random.default_rng(0).integers(0, 150, 300)
  for key, value in once.gather(indices).items():
    other = late.gather(indices)[key]
    np.testing.assert_array_equal(other, value)
    assert other.dtype == value.dtype
  assert once.class_names == late.class_names == ('0', '1', '2')


# Arrays.


def test_npz_gives_images_and_labels(tmp_path):
  images, labels = noise(5, 8, 8, 3), np.array([3, 0, -1, 1, 1])
  np.savez_compressed(tmp_path / 'a.npz', images=images, labels=labels)
  source = arrays(tmp_path / 'a.npz')
  batch = everything(source)
  np.testing.assert_array_equal(batch['image'], images)
  np.testing.assert_array_equal(batch['label'], labels)
  assert batch['label'].dtype == np.int32
  assert source.class_names == ('0', '1', '2', '3')


def test_npy_is_mapped_and_gray_needs_no_channel(tmp_path):
  images = noise(5, 8, 8)
  np.save(tmp_path / 'a.npy', images)
  batch = arrays(tmp_path / 'a.npy', channels=1).gather(np.array([4, 0]))
  np.testing.assert_array_equal(batch['image'], images[[4, 0], ..., None])
  assert type(batch['image']) is np.ndarray
  assert batch['label'].tolist() == [-1, -1]


def test_arrays_of_another_size_are_fitted_as_files_are(tmp_path, when):
  images = noise(5, 20, 30, 3)
  np.save(tmp_path / 'a.npy', images)
  for i, image in enumerate(images):
    save(tmp_path / f'{i}.png', image)
  np.testing.assert_array_equal(
    everything(arrays(tmp_path / 'a.npy'))['image'],
    everything(folder(tmp_path))['image'],
  )


@pytest.mark.parametrize(
  ('contents', 'message'),
  [
    ({'images': np.zeros((2, 8, 8, 3), np.float32)}, 'float32; save .* uint8'),
    ({'images': np.zeros((8, 8), np.uint8)}, r'shape \(8, 8\)'),
    ({'images': np.zeros((2, 3, 8, 8), np.uint8)}, r'\(2, 3, 8, 8\); save'),
    ({'images': np.zeros((8, 8, 3), np.uint8)}, r'\(8, 8, 3\); save'),
    ({'images': np.zeros((0, 8, 8, 3), np.uint8)}, r'\(0, 8, 8, 3\); save'),
    ({'x': np.zeros(3)}, 'no `images`, only: x'),
    ({'images': np.array([{}, {}])}, 'cannot be read'),
    ({'images': noise(2, 8, 8, 3), 'labels': np.zeros(3, int)}, r'\(3,\)'),
    ({'images': noise(2, 8, 8, 3), 'labels': np.zeros(2)}, 'labels are float'),
    ({'images': noise(2, 8, 8, 3), 'labels': [0, -2]}, 'integer from 0'),
  ],
)
def test_bad_arrays_are_explained(tmp_path, contents, message):
  np.savez(tmp_path / 'a.npz', **contents)
  with pytest.raises(errors.UserError, match=message) as caught:
    arrays(tmp_path / 'a.npz')
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', ['a.npz', 'a.npy'])
def test_broken_array_files_are_explained(tmp_path, name):
  path = tmp_path / name
  with pytest.raises(errors.UserError, match='is not a file'):
    arrays(path)
  for contents in (b'', b'PK\x03\x04 nonsense', b'\x93NUMPY\x01', b'\x80\x04x'):
    path.write_bytes(contents)
    with pytest.raises(errors.UserError, match='cannot be read'):
      arrays(path)
  np.savez(tmp_path / 'good.npz', images=noise(2, 8, 8, 3))
  path.write_bytes((tmp_path / 'good.npz').read_bytes()[:300])
  with pytest.raises(errors.UserError, match='cannot be read'):
    arrays(path)
