"""`--mode=compress` and `--mode=decompress`, on a small run."""

import shutil

import numpy as np
import pytest
from PIL import ExifTags
from PIL import Image

from ddpm_jax import errors
from ddpm_jax import inputs
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax.compression import compressed
from ddpm_jax.compression import file_format
from ddpm_jax.compression import transmission
from ddpm_jax.parallel import meshes

SMALL = [
  '--config.codec.steps=6',
  '--config.codec.log2_candidates=7',
  '--config.codec.group_bits=6.0',
  '--config.codec.batch_size=4',
]
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), np.uint8)


@pytest.fixture(scope='module')
def sent(tiny_run, tmp_path_factory):
  """(workdir, the file of six images: a batch of four, and a part of one)."""
  folder = tmp_path_factory.mktemp('codec')
  np.savez(folder / 'six.npz', images=IMAGES)
  main.run(
    [
      *('--mode=compress', f'--workdir={tiny_run[0]}', *SMALL),
      *(f'--images={folder / "six.npz"}', f'--output={folder / "six.ddpm"}'),
    ]
  )
  assert sorted(p.name for p in folder.iterdir()) == ['six.ddpm', 'six.npz']
  return tiny_run[0], folder / 'six.ddpm'


@pytest.fixture(scope='module')
def trained(sent):
  """What the jobs work with: the recipe and the weights."""
  config = recipe.resolve(None, sent[0], dict(x[9:].split('=') for x in SMALL))
  *_, params = runs.restore(config, meshes.make_mesh(1), sent[0])
  return config, params


@pytest.fixture(scope='module')
def held(trained):
  """What the sender held, in the same process."""
  return transmission.send(*trained, IMAGES, 0)


def receive(workdir, file, output, *more):
  main.run(
    [
      *('--mode=decompress', f'--workdir={workdir}', f'--input={file}'),
      *(f'--output={output}', *more),
    ]
  )
  with np.load(output) as arrays:
    return arrays['images']


def read(file, trained):
  data = file.read_bytes()
  header, _ = file_format.read_header(data)
  return file_format.read(
    data, transmission.rules(trained[0], header['squares'])
  )[0]


def test_it_is_the_very_image_that_the_sender_held(sent, held, tmp_path, capfd):
  workdir, file = sent
  assert file.read_bytes() == held.data
  images = receive(workdir, file, tmp_path / 'a.npz')
  np.testing.assert_array_equal(images, held.shown[-1])
  assert 'cut off' not in capfd.readouterr().err


def test_any_first_part_shows_what_the_sender_held_then(
  sent, held, trained, tmp_path, capfd
):
  workdir, file = sent
  ends = read(file, trained).ends
  steps = sorted(ends)[1]
  at = f'--bytes={ends[steps] + 1}'
  images = receive(workdir, file, tmp_path / 'a.npz', at)
  np.testing.assert_array_equal(images, held.shown[steps])
  assert f'the first {steps} of 6 steps' in capfd.readouterr().err
  # Cut by hand it is the same; with no step at all, what x_T alone shows.
  cut = tmp_path / 'cut.ddpm'
  cut.write_bytes(file.read_bytes()[: ends[0] + 5])
  images = receive(workdir, cut, tmp_path / 'b.npz')
  np.testing.assert_array_equal(images, held.shown[0])
  assert 'the first 0 of 6 steps' in capfd.readouterr().err


def test_what_is_sent_tells_of_the_image(held):
  """RMSE falls, and ΣKL and the code grow, with every step."""
  spent = transmission.spent(held, IMAGES)
  assert spent.rmse[-1] < 0.2 * spent.rmse[0]
  assert np.all(np.diff(spent.kl) > 0)
  assert np.all(np.diff(spent.code) > 0)
  assert spent.code[-1] > spent.kl[-1]


def test_an_image_a_folder_and_an_array_are_the_same(trained, tmp_path):
  config, _ = trained
  Image.fromarray(IMAGES[0, ..., 0]).save(tmp_path / 'a.png')
  np.save(tmp_path / 'a.npy', IMAGES[:1])
  for path in (tmp_path / 'a.png', tmp_path, tmp_path / 'a.npy'):
    np.testing.assert_array_equal(inputs.read(path, config), IMAGES[:1])


def test_what_is_resized_is_said(trained, tmp_path, capsys):
  config, _ = trained

  def said(path):
    inputs.read(path, config)
    return capsys.readouterr().err

  how = 'resized (shorter side, bicubic) and cut to 8x8, in the middle'
  folder = tmp_path / 'many'
  folder.mkdir()
  sizes = [(8, 8), (9, 8), (9, 8), (20, 30), (7, 7), (6, 6), (5, 5)]
  for i, size in enumerate(sizes):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6 if size == (20, 30) else 1
    Image.new('L', size).save(folder / f'{i}.png', exif=exif)
  one = folder / '3.png'  # lies on its side
  assert said(one) == f'{one} is 30x20: {how}\n'
  assert said(folder / '0.png') == ''
  assert said(folder) == (
    f'of the images of {folder}, 2 of 9x8, 1 of 30x20, 1 of 7x7, 2 of 2 other '
    f'sizes: {how}\n'
  )
  for shape, told in (((4, 8, 8), ''), ((4, 5, 6), ', 4 of 6x5: ')):
    np.save(tmp_path / 'a.npy', np.zeros(shape, np.uint8))
    err = said(tmp_path / 'a.npy')
    assert told in err
    assert bool(told) == (how in err)


def test_how_long_it_will_take_is_said_after_a_batch(trained, capsys):
  class Program:
    size, steps = 4, 6

    def run(self, params, batch, *_):
      return {'shown': np.zeros((1, self.size))}

  config, params = trained
  told = {'code': np.zeros((6, 4))}
  for n, message in ((9, 'the first of 3 batches took '), (4, '')):
    images = np.zeros((n, 8, 8, 1), np.uint8)
    passed = transmission.run_batches(
      config, Program(), params, images, [], told, True
    )
    assert passed['shown'].shape == (1, n)
    err = capsys.readouterr().err
    assert message in err
    assert bool(message) == (' s to go' in err)


def test_damage_is_one_line_and_writes_nothing(sent, tmp_path):
  workdir, file = sent
  rng, good = np.random.default_rng(0), file.read_bytes()
  for at in (3, 40, len(good) - 2, *rng.integers(300, len(good), 2)):
    data = bytearray(good)
    data[at] ^= 16
    (tmp_path / 'bad.ddpm').write_bytes(data)
    with pytest.raises(errors.UserError, match=r'bad\.ddpm: '):
      receive(workdir, tmp_path / 'bad.ddpm', tmp_path / 'a.npz')
  assert [p.name for p in tmp_path.iterdir()] == ['bad.ddpm']


def test_other_weights_are_refused(sent, tmp_path):
  workdir, file = sent
  other = shutil.copytree(workdir, tmp_path / 'run')
  newest = max((other / 'checkpoints').iterdir(), key=lambda p: int(p.name))
  shutil.rmtree(newest)
  with pytest.raises(errors.UserError, match='other weights'):
    receive(other, file, tmp_path / 'a.npz')


def rewritten(file, trained, path, check=0, **header):
  """The same code in a file that says otherwise."""
  got = read(file, trained)
  checks = [got.checks.get(s + 1, 0) for s in range(6)]
  data, _, _ = file_format.write(
    {**got.header, **header},
    transmission.rules(trained[0], got.header['squares']),
    *(got.size, got.chosen, np.array(checks) ^ check),
  )
  path.write_bytes(data)
  return path


def test_what_is_read_is_written_again_the_same(sent, trained, tmp_path):
  again = rewritten(sent[1], trained, tmp_path / 'a')
  assert again.read_bytes() == sent[1].read_bytes()


def test_other_software_is_warned_of(sent, trained, tmp_path, capfd):
  header = read(sent[1], trained).header
  compressed.check_same(*trained, header, tmp_path)
  assert not capfd.readouterr().err
  old = {**header['software'], 'jax': '0.0.1'}
  compressed.check_same(*trained, {**header, 'software': old}, tmp_path)
  assert 'jax 0.0.1 -> ' in capfd.readouterr().err


def test_other_numbers_are_not_shown(sent, trained, tmp_path):
  """Had the network computed others, the checks would not be these."""
  file = rewritten(sent[1], trained, tmp_path / 'a', check=1)
  with pytest.raises(errors.UserError, match='computes other numbers'):
    receive(sent[0], file, tmp_path / 'a.npz')
  assert not (tmp_path / 'a.npz').exists()


def test_images_of_another_shape_are_refused(sent, trained, tmp_path):
  got = read(sent[1], trained)
  header = {**got.header, 'shape': [16, 16, 1]}
  with pytest.raises(errors.UserError, match='of 16 x 16 x 1'):
    compressed.check_same(*trained, header, tmp_path)


@pytest.mark.parametrize(
  ('flags', 'what'),
  [
    (['--mode=compress'], 'set what to compress'),
    (['--mode=compress', '--images=no.png', '--output=a'], 'cannot be read'),
    (['--mode=decompress'], 'set what to decompress'),
    (['--mode=decompress', '--input=no', '--output=a.npz'], 'No such file'),
    (['--mode=sample', '--images=a'], 'is for --mode=compress'),
    (['--mode=sample', '--bytes=3'], 'is for --mode=decompress'),
    (
      ['--mode=compress', '--images=a.png', '--output=a'],
      'log2_candidates=40 must be at least 1 and at most 24',
    ),
  ],
)
def test_a_mistake_is_one_line(sent, flags, what, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  Image.fromarray(IMAGES[0, ..., 0]).save('a.png')
  if '40' in what:
    flags = [*flags, '--config.codec.log2_candidates=40']
  with pytest.raises(errors.UserError, match=what):
    main.run([f'--workdir={sent[0]}', *flags])


def test_decompress_takes_the_rules_of_the_file(sent, trained):
  """They are not those of the workdir: its codec has 30 steps."""
  assert recipe.resolve(None, sent[0], {}).codec.steps == 30
  header, _ = file_format.read_header(sent[1].read_bytes())
  assert header['codec'] == dict(trained[0].codec)
