"""Files as others made them, by accident or on purpose: read, or refused."""

import io
import json
import os
import pathlib
import resource
import socket
import struct
import subprocess
import sys
import threading
import unicodedata
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL import PngImagePlugin

from ddpm_jax import errors
from ddpm_jax import imagefile
from ddpm_jax import inputs
from ddpm_jax import npz
from ddpm_jax.data import arrayfile
from ddpm_jax.data import captions
from ddpm_jax.data import decode
from ddpm_jax.data import image_folder
from ddpm_jax.data import sources
from ddpm_jax.data import unresized
from ddpm_jax.metrics import fidelity

ROOT = pathlib.Path(__file__).parents[1] / 'ddpm_jax'


def save(path, colour='red', **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', (12, 8), colour).save(path, **options)


def folder(path, **options):
  return sources.folder(
    path=str(path), image_size=(8, 8), channels=3, max_unreadable=0, **options
  )


# Text files.


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
@pytest.mark.parametrize('delimiter', [',', ';', '\t'])
def test_a_CSV_is_read_as_Excel_writes_it(tmp_path, encoding, delimiter):
  text = 'File_Name ,Text\r\na.png,"a dog;\r\nin ""été"", a\tday"\r\n,\r\n'
  rows = text.replace(',', delimiter, 1).replace('png,', f'png{delimiter}')
  rows = rows.replace('\n,', f'\n{delimiter}')
  (tmp_path / 'captions.csv').write_bytes(rows.encode(encoding))
  found = captions.of_folder(str(tmp_path), ['a.png'])
  assert found == [('a dog;\r\nin "été", a\tday',)]


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (b'image;prompt\na.png;x\n', r"columns are 'image', 'prompt'; .*file_name"),
    (b'', 'file_name, and text or caption'),
    (b'file_name,text\na.png,caf\xe9\n', 'not UTF-8 .*save it as "CSV UTF-8"'),
    (b'file_name,text\n"a\nb.png",x\n', r"csv:3: no image 'a\\nb.png' in its"),
    (b'file_name,text\n,x\n', "csv:2: no image ''"),
    (b'text,file_name\nx\n', 'csv:2: no image None'),
  ],
)
def test_what_is_wrong_with_a_CSV_is_said(tmp_path, data, message):
  (tmp_path / 'captions.csv').write_bytes(data)
  with pytest.raises(errors.UserError, match=message) as caught:
    captions.of_folder(str(tmp_path), ['a.png'])
  assert '\n' not in str(caught.value)


def test_names_are_matched_whatever_their_normalisation(tmp_path):
  nfc = unicodedata.normalize('NFC', 'é.PNG')
  nfd = unicodedata.normalize('NFD', 'é.PNG')
  assert nfc != nfd
  for there, told in ((nfc, nfd), (nfd, nfc), ('d/a.jpg', 'd\\a.JPG')):
    match = image_folder.matcher([there, 'other.png'])
    assert match(told) == there
  both = image_folder.matcher([nfc, nfd])
  assert (both(nfc), both(nfd)) == (nfc, nfd)
  assert both(nfd.lower()) is None  # it may be either
  assert image_folder.matcher(['a.png'])(None) is None
  save(tmp_path / nfd)
  line = json.dumps({'file_name': nfc, 'label': 'x', 'text': 'y'})
  (tmp_path / 'metadata.jsonl').write_text(line)
  source = folder(tmp_path, captions='file')
  assert source.class_names == ('x',)
  assert source.captions == (('y',),)


@pytest.mark.parametrize(
  'lines',
  [
    '{"file_name": "clip.mp4", "label": 1}',
    '{"file_name": "a.png", "label": {"box": 1}}',
    '{"file_name": "a.png", "label": 1}\n{"file_name": "gone.png"}',
    'not JSON',
    '[' * 100_000,
  ],
)
def test_metadata_of_another_tool_matter_only_where_labels_do(
  tmp_path, lines, caplog
):
  save(tmp_path / 'a.png')
  (tmp_path / 'metadata.jsonl').write_text(lines)
  assert folder(tmp_path, needs_labels=False).class_names == ()
  assert len([x for x in caplog.messages if 'metadata.jsonl' in x]) == 1
  if 'clip' not in lines:
    with pytest.raises(errors.UserError, match=r'metadata.jsonl:\d'):
      folder(tmp_path)


def test_metadata_in_UTF_16_are_read(tmp_path):
  save(tmp_path / 'a.png')
  text = '{"file_name": "a.png", "label": "ĊĀ"}\r\n'
  (tmp_path / 'metadata.jsonl').write_bytes(text.encode('utf-16'))
  assert folder(tmp_path).class_names == ('ĊĀ',)


def test_numbers_of_any_length_are_compared_in_names():
  names = ['1' * 5000, '2', '10', '01', '1']
  want = ['01', '1', '2', '10', '1' * 5000]
  assert sorted(names, key=image_folder.natural) == want


def test_a_text_that_is_not_unicode_is_refused():
  with pytest.raises(errors.UserError, match='is not Unicode'):
    captions.tokens(['a \udcff'], 10)


# Folders.


def test_a_folder_is_entered_once_however_many_links_lead_to_it(tmp_path):
  images = tmp_path / 'images'
  save(images / 'b' / 'x.png')
  save(images / 'b' / 'deep' / 'y.png')
  save(tmp_path / 'elsewhere' / 'z.png')
  for name, target in (
    ('a', 'b'),
    ('again', '.'),
    ('c', '../elsewhere'),
    ('d', '../elsewhere'),
    ('b/up', '..'),
    ('b/deep/parent', '../..'),
    ('b/deep/self', 'self'),
  ):
    (images / name).symlink_to(target)
  found = image_folder.find(str(images))
  assert found == ['b/deep/y.png', 'b/x.png', 'c/z.png']


def test_a_link_to_an_image_that_is_listed_is_passed_over(tmp_path, caplog):
  save(tmp_path / 'i' / 'a.png')
  save(tmp_path / 'blob.png')
  (tmp_path / 'i' / 'b.png').symlink_to('a.png')
  for name in ('c.png', 'd.png'):
    (tmp_path / 'i' / name).symlink_to('../blob.png')
  (tmp_path / 'i' / 'e.png').symlink_to('nowhere')
  (tmp_path / 'i' / 'f.png').symlink_to('f.png')
  found = image_folder.find(str(tmp_path / 'i'))
  # What leads nowhere is said when it is decoded.
  assert found == ['a.png', 'c.png', 'd.png', 'e.png', 'f.png']
  assert caplog.messages == ['skipped 1 links to images that are listed anyway']


@pytest.fixture
def strange(tmp_path):
  """A folder of an image, a pipe, a socket, devices, and links to them."""
  save(tmp_path / 'a.png')
  os.mkfifo(tmp_path / 'pipe.png')
  here = os.open(tmp_path, os.O_RDONLY)
  server = socket.socket(socket.AF_UNIX)
  server.bind(f'/proc/self/fd/{here}/socket.png')
  (tmp_path / 'zero.png').symlink_to('/dev/zero')
  (tmp_path / 'linked.png').symlink_to('pipe.png')
  (tmp_path / 'folder.png').mkdir()
  yield tmp_path
  server.close()
  os.close(here)


def test_pipes_sockets_and_devices_are_passed_over(strange, caplog):
  assert image_folder.find(str(strange)) == ['a.png']
  assert 'skipped, not regular files: ' in caplog.text
  assert len(folder(strange)) == 1


@pytest.mark.parametrize(
  'name', ['pipe.png', 'socket.png', 'zero.png', 'linked.png', 'folder.png']
)
def test_they_are_never_opened_by_any_reader(strange, name):
  path = strange / name
  with pytest.raises(errors.UserError, match='not a regular file'):
    inputs.opened('mask', path)
  with pytest.raises(errors.UserError, match='is not a file'):
    arrayfile.load(str(path))
  with pytest.raises(errors.UserError, match='is not a file'):
    fidelity.load(path)
  for text in ('metadata.jsonl', 'captions.csv'):
    (strange / text).symlink_to(path)
    with pytest.raises(errors.UserError, match='not a regular file'):
      captions.of_folder(str(strange), ['a.png'])
    (strange / text).unlink()


def test_a_folder_that_cannot_be_read_is_said(tmp_path, monkeypatch, caplog):
  save(tmp_path / 'a' / 'x.png')
  save(tmp_path / 'b' / 'y.png')
  scandir = os.scandir

  def refusing(path):
    if str(path).rstrip('/').endswith('b'):
      raise PermissionError(13, 'Permission denied', path)
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', refusing)
  assert image_folder.find(str(tmp_path)) == ['a/x.png']
  assert caplog.messages == ['skipped folder: b (Permission denied)']
  with pytest.raises(errors.UserError, match=r'b cannot be read \(Permission'):
    image_folder.find(str(tmp_path / 'b'))


@pytest.mark.parametrize('name', [b'a\nb.png', b'a\xffb.png', b'a\x1b[2J.png'])
def test_any_name_can_be_read_and_is_shown_in_one_line(tmp_path, name, caplog):
  path = os.fsdecode(name)
  save(tmp_path / 'fine.png')
  save(tmp_path / path, format='PNG')
  assert len(folder(tmp_path)) == 2
  (tmp_path / path).write_bytes(b'broken')
  sources.folder(
    path=str(tmp_path), image_size=(8, 8), channels=3, max_unreadable=1
  )
  (said,) = caplog.messages
  assert said.isprintable()
  assert repr(path) in said


# Images.


def test_every_image_is_opened_by_the_one_function():
  found = {
    str(path.relative_to(ROOT))
    for path in ROOT.rglob('*.py')
    for call in ('Image.open(', 'np.load(', 'ZipFile(')
    if call in path.read_text()
  }
  assert found == {'imagefile.py', 'npz.py'}


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
showpage
%%EOF
"""


@pytest.mark.parametrize('name', ['a.png', 'a.jpg', 'a.tif'])
def test_an_EPS_by_another_name_starts_nothing(tmp_path, name, monkeypatch):
  (tmp_path / name).write_bytes(EPS)
  with Image.open(tmp_path / name) as image:
    assert image.format == 'EPS'  # of which Pillow would draw the pixels

  def refuse(*args, **options):
    raise AssertionError('a program was started')

  monkeypatch.setattr(subprocess, 'check_call', refuse)
  monkeypatch.setattr(subprocess, 'Popen', refuse)
  with pytest.raises(ValueError, match='it is none of PNG, JPEG'):
    decode.read(str(tmp_path / name), (8, 8, 3))
  with pytest.raises(errors.UserError, match='cannot be read'):
    unresized.load(tmp_path)
  with pytest.raises(errors.UserError, match=f'--image={tmp_path}'):
    inputs.opened('image', tmp_path / name)


def exif_of(orientation, *entries):
  """TIFF fields, 12 bytes each, after that of the orientation."""
  first = struct.pack('<HHII', 0x112, 3, 1, orientation)
  fields = [first, *entries]
  offset = 8 + 2 + 12 * len(fields) + 4
  # Where the entries point to: -1 / 0.
  body = struct.pack('<H', len(fields)) + b''.join(fields) + bytes(4)
  assert len(body) + 8 == offset
  return b'Exif\0\0II*\0\x08\0\0\0' + body + struct.pack('<ii', -1, 0)


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp'])
@pytest.mark.parametrize('kind', [1, 2, 5, 10, 12, 99])
def test_a_wrong_field_of_EXIF_spoils_no_photo(tmp_path, suffix, kind):
  at = 8 + 2 + 12 * 2 + 4
  exif = exif_of(6, struct.pack('<HHII', 0x11A, kind, 1, at))
  path = tmp_path / f'a.{suffix}'
  Image.new('RGB', (20, 10), 'red').save(path, exif=exif)
  assert decode.upright(str(path)).size == (10, 20)
  assert decode.shape_of(str(path)) == (20, 10, 3)


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'tif'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_the_header_tells_the_upright_shape(tmp_path, suffix, orientation):
  exif = Image.Exif()
  exif[0x112] = orientation
  path = str(tmp_path / f'a.{suffix}')
  Image.new('RGB', (20, 10)).save(path, exif=exif)
  assert decode.read(path, decode.shape_of(path)).shape == (
    decode.shape_of(path)
  )
  width, height = decode.upright(path).size
  assert decode.shape_of(path) == (height, width, 3)
  assert (width < height) == (orientation >= 5)


def test_no_text_in_a_PNG_spoils_it(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
  text = PngImagePlugin.PngInfo()
  for i in range(3):
    text.add_text(f'prompt {i}', 'x' * 2**26, zip=True)
  text.add_itxt('workflow', 'y' * 2**21)
  after = b'after\0\0' + zlib.compress(b'z' * 2**25)
  text.add(b'zTXt', after, after_idat=True)
  exif = Image.Exif()
  exif[0x112] = 3
  path = tmp_path / 'a.png'
  profile = bytes(2**23)
  Image.fromarray(pixels).save(
    path, pnginfo=text, exif=exif, icc_profile=profile
  )
  got = np.asarray(decode.upright(str(path)))
  np.testing.assert_array_equal(got, pixels[::-1, ::-1])


def png(width, height, rows=b''):
  def chunk(kind, data):
    code = kind + data
    return struct.pack('>I', len(data)) + code + zlib.crc32(code).to_bytes(4)

  head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', head)
    + chunk(b'IDAT', zlib.compress(rows))
    + chunk(b'IEND', b'')
  )


@pytest.mark.parametrize(
  'size',
  [
    (2**16, 1),
    (1, 30_000_000),
    (11_586, 11_586),
    (20_000, 20_000),
    (2**31 - 1, 2**31 - 1),
  ],
)
def test_a_huge_image_is_refused_by_its_header(tmp_path, size, monkeypatch):
  def refuse(image):
    raise AssertionError('it was decoded')

  monkeypatch.setattr(Image.Image, 'load', refuse)
  monkeypatch.setattr(PngImagePlugin.PngImageFile, 'load', refuse)
  path = tmp_path / 'a.png'
  path.write_bytes(png(*size))
  with pytest.raises(ValueError, match=r'pixels') as caught:
    decode.read(str(path), (8, 8, 3))
  assert str(imagefile.MAX_PIXELS) in str(caught.value)
  for flag in ('image', 'mask', 'to'):
    with pytest.raises(errors.UserError, match=f'--{flag}=.*pixels'):
      inputs.opened(flag, path)
  with pytest.raises(errors.UserError, match='pixels'):
    unresized.load(tmp_path)


def test_a_huge_tile_of_a_small_TIFF_is_refused(tmp_path):
  values = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 277: 1}
  values |= {322: 60_000, 323: 60_000, 324: 8, 325: 64}
  fields = [struct.pack('<HHII', tag, 4, 1, x) for tag, x in values.items()]
  body = struct.pack('<H', len(fields)) + b''.join(fields) + bytes(4)
  path = tmp_path / 'a.tif'
  path.write_bytes(b'II*\0\x08\0\0\0' + body)
  with pytest.raises(ValueError, match='60000x60000 pixels'):
    decode.read(str(path), (8, 8, 3))


def test_a_huge_file_is_refused_by_its_length(tmp_path):
  path = tmp_path / 'a.webp'
  with path.open('wb') as file:
    file.truncate(imagefile.MAX_BYTES + 1)  # sparse
  with pytest.raises(ValueError, match='bytes, and may have'):
    decode.read(str(path), (8, 8, 3))


def test_pixels_in_flight_are_bounded(tmp_path, monkeypatch):
  monkeypatch.setattr(imagefile, '_in_flight', imagefile._Budget(250))
  for i in range(12):
    save(tmp_path / f'{i}.png')  # 96 pixels
  lock, inside, most = threading.Lock(), 0, 0

  def work(i):
    nonlocal inside, most
    with imagefile.opened(tmp_path / f'{i}.png') as image:
      with lock:
        inside += 1
        most = max(most, inside)
      image.load()
      met.wait(0.05)
      with lock:
        inside -= 1

  met = threading.Event()
  threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert not any(thread.is_alive() for thread in threads)
  assert most == 2


@pytest.mark.parametrize('mode', ['P', 'LA', 'RGBA'])
def test_bands_of_a_transparent_image_are_the_whole(mode, monkeypatch):
  rng = np.random.default_rng(0)
  if mode == 'P':
    image = Image.fromarray(rng.integers(0, 256, (37, 23), np.uint8), 'P')
    image.putpalette(rng.integers(0, 256, 768).tolist())
    image.info['transparency'] = bytes(rng.integers(0, 256, 256).tolist())
  else:
    shape = 37, 23, len(mode)
    image = Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode)
  whole = decode.fit(image, (37, 23, 3))
  monkeypatch.setattr(decode, '_BAND', 70)
  np.testing.assert_array_equal(decode.fit(image, (37, 23, 3)), whole)
  white = Image.new('RGBA', image.size, 'white')
  flat = Image.alpha_composite(white, image.convert('RGBA')).convert('RGB')
  np.testing.assert_array_equal(whole, np.asarray(flat))


def test_a_large_image_takes_the_memory_that_is_stated(tmp_path):
  path = tmp_path / 'a.png'
  side = 6000
  Image.new('RGBA', (side, side), (9, 9, 9, 99)).save(path, compress_level=1)
  # Not `getrusage`, whose peak a child has of its parent.
  code = (
    'import re, sys; from ddpm_jax.data import decode;'
    'peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", '
    'open("/proc/self/status").read())[1]);'
    'before = peak(); decode.read(sys.argv[1], (64, 64, 3));'
    'print((peak() - before) * 1024)'
  )
  run = [sys.executable, '-c', code, str(path)]
  taken = int(subprocess.check_output(run))
  # 4 bytes as decoded, 4 laid on white; 16 are stated of the worst format.
  assert 4 * side**2 < taken < 10 * side**2


# Arrays.


def test_samples_of_openai_are_data(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
  np.savez(tmp_path / 'a.npz', images, np.arange(4))
  found, labels = arrayfile.load(str(tmp_path / 'a.npz'))
  np.testing.assert_array_equal(found, images)
  assert labels.tolist() == [0, 1, 2, 3]
  source, shape = unresized.load(tmp_path / 'a.npz')
  assert (len(source), shape) == (4, (8, 8, 3))
  with pytest.raises(errors.UserError, match=r'has images, .*name=arrays'):
    fidelity.load(tmp_path / 'a.npz')


def npy(shape, descr='|u1', data=b'', header=None):
  text = header or repr(
    {'descr': descr, 'fortran_order': False, 'shape': shape}
  )
  body = text.encode() + b'\n'
  return b'\x93NUMPY\1\0' + struct.pack('<H', len(body)) + body + data


HOSTILE = {
  'more than follows': npy((10**6, 64, 64, 3)),
  'absurd': npy((10**18, 10**18)),
  'negative': npy((-1, 8, 8, 3), data=bytes(192)),
  'zero of many': npy((0, 10**30)),
  'objects': npy((1,), '|O', b'\x80\4cos\nsystem\n.'),
  'objects in fields': npy((1,), [('a', '|O')], b'\x80\4.'),
  'empty strings': npy((10**12,), '|S0'),
  'nested': npy((), header='(' * 9000),
  'no dict': npy((), header='1'),
  'long header': b'\x93NUMPY\2\0' + struct.pack('<I', 2**32 - 1) + b' ' * 99,
  'other version': b'\x93NUMPY\x63\0' + bytes(99),
  'cut off': npy((2, 8, 8, 3), data=bytes(10)),
  'nothing': b'',
}


def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize('what', HOSTILE)
@pytest.mark.parametrize('form', ['npy', 'npz'])
def test_hostile_arrays_are_refused_before_anything_is_allocated(
  tmp_path, what, form
):
  path = tmp_path / f'a.{form}'
  path.write_bytes(HOSTILE[what])
  if form == 'npz':
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
      archive.writestr('images.npy', HOSTILE[what])
      archive.writestr('mu.npy', HOSTILE[what])
  before = peak()
  with pytest.raises(errors.UserError, match=r'cannot be read|have shape'):
    arrayfile.load(str(path))
  with pytest.raises(errors.UserError, match=r'cannot be read'):
    fidelity.load(path)
  assert peak() - before < 2**27


def test_a_zip_is_held_to_what_it_says(tmp_path, monkeypatch):
  path = tmp_path / 'a.npz'
  zeros = npy((2**24,), data=bytes(2**24))
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('images.npy', zeros)
  assert npz.load(path)['images'].shape == (2**24,)
  monkeypatch.setattr(npz, 'MAX_BYTES', 2**24)
  with pytest.raises(ValueError, match='at most 16777216 are read'):
    npz.load(path)
  monkeypatch.undo()
  # Its directory gives ten thousand times the size that it has.
  said = bytearray(path.read_bytes())
  at = said.rindex(b'PK\1\2')
  said[at + 24 : at + 28] = struct.pack('<I', 2**32 - 2)
  path.write_bytes(said)
  with pytest.raises(ValueError, match=r'cannot have 4294967294 bytes'):
    npz.load(path)
  for how in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
    with zipfile.ZipFile(path, 'w', how) as archive:
      archive.writestr('images.npy', zeros)
    with pytest.raises(ValueError, match='NumPy does not use'):
      npz.load(path)


def test_what_NumPy_writes_is_read_to_the_bit(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {
    'a': rng.normal(size=(3, 4)),
    'b': np.asfortranarray(rng.integers(0, 9, (5, 2))),
    'c': np.array('text é'),
    'd': np.zeros((0, 3), np.float32),
    'e': np.array(True),
    'f': rng.normal(size=3) + 1j,
    'g/h': np.arange(3, dtype='>u2'),
  }
  for write in (np.savez, np.savez_compressed):
    write(tmp_path / 'a.npz', **arrays)
    for got in (npz.load(tmp_path / 'a.npz'), load_bytes(tmp_path / 'a.npz')):
      assert got.keys() == arrays.keys()
      for name, value in arrays.items():
        np.testing.assert_array_equal(got[name], value)
        assert got[name].dtype == value.dtype
  for name, value in arrays.items():
    path = tmp_path / 'one.npy'
    np.save(path, value)
    got = npz.mapped(path)
    np.testing.assert_array_equal(got, value, err_msg=name)
    assert got.dtype == value.dtype


def load_bytes(path):
  return npz.load(io.BytesIO(path.read_bytes()))


def test_a_line_that_excel_writes_for_itself_is_passed_over(tmp_path):
  Image.new('L', (8, 8)).save(tmp_path / 'a.png')
  (tmp_path / 'captions.csv').write_text('sep=;\nfile_name;text\na.png;x\n')
  assert captions.of_folder(str(tmp_path), ['a.png']) == [('x',)]


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('file_name,other\na.png,x\n', 'captions need file_name, and'),
    ('file_name,text\na.png,' + 'x' * 200_000 + '\n', r'csv:2: not CSV \('),
  ],
)
def test_a_csv_that_holds_no_captions_is_a_line(text, message, tmp_path):
  (tmp_path / 'captions.csv').write_text(text)
  with pytest.raises(errors.UserError, match=message):
    captions.of_folder(str(tmp_path), ['a.png'])


def test_a_csv_too_large_to_be_read_says_what_to_write_instead(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(captions, 'MOST', 10)
  (tmp_path / 'captions.csv').write_text('file_name,text\n')
  with pytest.raises(errors.UserError, match=r'write the captions as metadata'):
    captions.of_folder(str(tmp_path), ['a.png'])


def test_a_line_too_long_is_refused_before_it_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(image_folder, 'LONGEST', 100)
  (tmp_path / 'metadata.jsonl').write_text('{"a": "' + 'x' * 100 + '"}\n')
  with pytest.raises(errors.UserError, match='jsonl:1: more than 100 bytes'):
    list(image_folder.lines(str(tmp_path / 'metadata.jsonl')))


def test_a_text_that_went_away_is_a_line(tmp_path):
  with pytest.raises(errors.UserError, match=r'cannot be read \(No such'):
    list(image_folder.lines(str(tmp_path / 'metadata.jsonl')))


def test_an_image_whose_exif_cannot_be_read_stays_as_it_is(
  tmp_path, monkeypatch
):
  def fail(self):
    raise SyntaxError('broken')

  Image.new('L', (2, 3)).save(tmp_path / 'a.png')
  monkeypatch.setattr(Image.Image, 'getexif', fail)
  assert decode.upright(str(tmp_path / 'a.png')).size == (2, 3)


def test_pixels_of_other_types_are_refused():
  with pytest.raises(ValueError, match='pixels are float64, not uint8'):
    decode.fit_array(np.zeros((2, 2, 1)), (2, 2, 1))
