"""TFDS without TensorFlow, and CIFAR-10 from its archive."""

import hashlib
import http.server
import io
import json
import pathlib
import socket
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets

from ddpm_jax import errors
from ddpm_jax.data import cifar
from ddpm_jax.data import sources

CLASSES = [
  'airplane',
  'automobile',
  'bird',
  'cat',
  'deer',
  'dog',
  'frog',
  'horse',
  'ship',
  'truck',
]


def tfds(path, name='cifar10', split='train', size=(32, 32), channels=3):
  return sources.tfds(
    path=str(path),
    tfds=name,
    split=split,
    image_size=size,
    channels=channels,
    max_unreadable=0,
  )


def everything(source):
  return source.gather(np.arange(len(source)))


def rows(n, seed):
  """A file of CIFAR-10: n rows of a label and the planes R, G, B."""
  data = np.random.default_rng(seed).integers(0, 256, (n, 3073), np.uint8)
  data[:, 0] %= 10
  return data


def write_archive(path):
  """Five training files of 4 images, a test file of 3; its sha256."""
  files = {f'data_batch_{i}.bin': rows(4, i).tobytes() for i in range(1, 6)}
  files['test_batch.bin'] = rows(3, 6).tobytes()
  files['batches.meta.txt'] = '\n'.join([*CLASSES, '', '']).encode()
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w:gz') as tar:
    for name in sorted(files, reverse=True):  # in no helpful order, as there
      member = tarfile.TarInfo(f'cifar-10-batches-bin/{name}')
      member.size = len(files[name])
      tar.addfile(member, io.BytesIO(files[name]))
  return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """A TFDS folder that our builder filled from a small archive."""
  root = tmp_path_factory.mktemp('tfds')
  cifar.prepare(root, sha256=write_archive(root / cifar.ARCHIVE))
  return root


def as_rows(images, labels):
  planes = np.moveaxis(np.stack(images), -1, 1).reshape(len(images), -1)
  return {
    bytes([label]) + plane.tobytes()
    for label, plane in zip(labels, planes, strict=True)
  }


@pytest.mark.parametrize(
  ('split', 'seeds'), [('train', range(1, 6)), ('test', [6])]
)
def test_plain_tfds_reads_what_we_prepared(prepared, split, seeds):
  data = tensorflow_datasets.data_source(
    'cifar10',
    split=split,
    data_dir=prepared,
    download=False,
    builder_kwargs={'file_format': 'array_record'},
  )
  expected = np.concatenate([rows(4 if s < 6 else 3, s) for s in seeds])
  assert len(data) == len(expected)
  for example in data:  # its id says which row it was
    row = expected[int(example['id'].decode().removeprefix(f'{split}_'))]
    assert example['label'] == row[0]
    np.testing.assert_array_equal(
      example['image'], row[1:].reshape(3, 32, 32).transpose(1, 2, 0)
    )


def test_our_source_reads_what_we_prepared(prepared):
  source = tfds(prepared)
  batch = everything(source)
  assert source.class_names == tuple(CLASSES)
  assert batch['image'].shape == (20, 32, 32, 3)
  assert as_rows(batch['image'], batch['label']) == {
    row.tobytes() for seed in range(1, 6) for row in rows(4, seed)
  }


def test_a_part_of_a_split_and_another_size_can_be_asked_for(prepared):
  source = tfds(prepared, split='train[:25%]+test', size=(16, 8), channels=1)
  assert everything(source)['image'].shape == (8, 16, 8, 1)


def test_an_unknown_split_is_answered_with_the_known_ones(prepared):
  with pytest.raises(errors.UserError, match=r"'trian'.* train, test"):
    tfds(prepared, split='trian')
  with pytest.raises(errors.UserError, match='no split'):
    tfds(prepared, split='train[:0]')


def test_the_archive_is_also_found_among_the_manual_downloads(tmp_path):
  sha256 = write_archive(tmp_path / 'downloads/manual' / cifar.ARCHIVE)
  cifar.prepare(tmp_path, sha256=sha256)
  assert len(tfds(tmp_path)) == 20


def test_processes_may_prepare_at_once(tmp_path):
  sha256 = write_archive(tmp_path / cifar.ARCHIVE)
  code = (
    'from ddpm_jax.data import cifar; '
    f'cifar.prepare({str(tmp_path)!r}, sha256={sha256!r})'
  )
  runs = [subprocess.Popen([sys.executable, '-c', code]) for _ in range(3)]
  assert [run.wait() for run in runs] == [0, 0, 0]
  assert len(tfds(tmp_path)) == 20


def test_a_truncated_archive_is_named_with_both_digests(tmp_path):
  path = tmp_path / cifar.ARCHIVE
  write_archive(path)
  path.write_bytes(path.read_bytes()[:-100])
  found = hashlib.sha256(path.read_bytes()).hexdigest()
  with pytest.raises(errors.UserError) as caught:
    tfds(tmp_path)
  for part in (str(path), found, cifar.SHA256):
    assert part in str(caught.value)


# The network.


@pytest.fixture
def server(tmp_path, monkeypatch):
  """A web server on this machine, of the folder tmp_path/web."""
  monkeypatch.setenv('no_proxy', '*')

  class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args):
      super().__init__(*args, directory=str(tmp_path / 'web'))

    def log_message(self, *args):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()


def test_an_absent_archive_is_downloaded(tmp_path, server):
  sha256 = write_archive(tmp_path / 'web' / cifar.ARCHIVE)
  root = tmp_path / 'root'
  cifar.prepare(root, url=f'{server}/{cifar.ARCHIVE}', sha256=sha256)
  assert len(tfds(root)) == 20
  assert [p.name for p in (root / 'downloads/manual').iterdir()] == [
    cifar.ARCHIVE
  ]


@pytest.mark.parametrize('name', [cifar.ARCHIVE, 'missing'])
def test_a_failed_download_leaves_nothing_behind(tmp_path, server, name):
  write_archive(tmp_path / 'web' / cifar.ARCHIVE)
  message = 'damaged' if name == cifar.ARCHIVE else '404.* by hand'
  with pytest.raises(errors.UserError, match=message):
    cifar.prepare(tmp_path, url=f'{server}/{name}', sha256='0' * 64)
  assert not list((tmp_path / 'downloads/manual').iterdir())


def test_without_network_we_say_at_once_where_to_put_it(tmp_path, monkeypatch):
  monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')  # nobody listens
  monkeypatch.delenv('no_proxy', raising=False)
  start = time.monotonic()
  with pytest.raises(errors.UserError) as caught:
    tfds(tmp_path)
  assert time.monotonic() - start < 5
  for part in (cifar.URL, 'by hand', str(tmp_path / 'downloads/manual')):
    assert part in str(caught.value)


def test_a_server_that_says_nothing_is_given_up(tmp_path, monkeypatch):
  monkeypatch.setenv('no_proxy', '*')
  with socket.create_server(('127.0.0.1', 0)) as silent:
    url = f'http://127.0.0.1:{silent.getsockname()[1]}/x'
    with pytest.raises(errors.UserError, match=r'timed out.* by hand'):
      cifar.prepare(tmp_path, url=url, timeout=0.2)


# Other sets of TFDS.


@pytest.mark.parametrize('name', ['mnist', 'imagenet2012', 'celeb_a'])
def test_what_is_not_prepared_is_explained_at_once(tmp_path, name):
  start = time.monotonic()
  with pytest.raises(errors.UserError) as caught:
    tfds(tmp_path, name)
  assert time.monotonic() - start < 5
  assert f'tfds build {name} --file_format=array_record' in str(caught.value)
  assert '--config.data.path' in str(caught.value)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('cifar11', 'did you mean cifar10'),
    ('', 'no data set'),
    ('nobody:nothing', 'no data set'),
    ('cifar10/large', 'cannot open .* BuilderConfig large not found'),
    ('cifar10:1.0.0', 'cannot open .* only: 3.0.2'),
  ],
)
def test_unknown_names_are_explained(tmp_path, name, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    tfds(tmp_path, name)
  assert '\n' not in str(caught.value)


def test_tfrecord_is_told_from_array_record(prepared, tmp_path):
  info = pathlib.Path('cifar10/3.0.2/dataset_info.json')
  there = tmp_path / info
  there.parent.mkdir(parents=True)
  for path in (prepared / info).parent.iterdir():
    there.with_name(path.name).write_bytes(path.read_bytes())
  text = json.loads(there.read_text())
  there.write_text(json.dumps({**text, 'fileFormat': 'tfrecord'}))
  with pytest.raises(errors.UserError, match='is prepared as tfrecord'):
    tfds(tmp_path)


def test_mock_data_stands_in_for_any_set(tmp_path, caplog):
  with tensorflow_datasets.testing.mock_data(num_examples=7):
    mnist = tfds(tmp_path, 'mnist', size=(28, 28), channels=1)
    batch = everything(mnist)
    flowers = everything(tfds(tmp_path, 'oxford_flowers102'))
    celebrities = everything(tfds(tmp_path, 'celeb_a'))
  assert mnist.class_names == tuple('0123456789')
  assert batch['image'].shape == (7, 28, 28, 1)
  assert batch['label'].dtype == np.int32
  assert (batch['label'] >= 0).all()
  assert flowers['image'].shape == (7, 32, 32, 3)  # of sizes of their own
  assert celebrities['label'].tolist() == [-1] * 7


def test_a_set_without_images_is_explained(tmp_path):
  with (
    tensorflow_datasets.testing.mock_data(num_examples=7),
    pytest.raises(errors.UserError, match='no feature `image`, only'),
  ):
    tfds(tmp_path, 'imdb_reviews')


def test_neither_tensorflow_nor_a_wall_of_logs_is_needed(tmp_path):
  sha256 = write_archive(tmp_path / cifar.ARCHIVE)
  code = f"""if True:
    import logging, sys
    import numpy as np
    logging.basicConfig(level=logging.WARNING)
    from ddpm_jax.data import cifar, sources
    cifar.prepare({str(tmp_path)!r}, sha256={sha256!r})
    source = sources.tfds(
      path={str(tmp_path)!r}, tfds='cifar10', split='test',
      image_size=(32, 32), channels=3, max_unreadable=0)
    batch = source.gather(np.arange(3))
    print(len(batch['label']), 'tensorflow' in sys.modules)
  """
  run = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert run.stdout.split() == ['3', 'False']
  assert run.stderr == ''


def test_a_folder_that_cannot_be_prepared_is_a_line(tmp_path, monkeypatch):
  write_archive(tmp_path / cifar.ARCHIVE)
  digest = hashlib.sha256((tmp_path / cifar.ARCHIVE).read_bytes()).hexdigest()

  def fail(*_, **__):
    raise OSError(28, 'No space left on device')

  builder = tensorflow_datasets.core.DatasetBuilder
  monkeypatch.setattr(builder, 'download_and_prepare', fail)
  with pytest.raises(errors.UserError, match=r'No space left.* fix that, or'):
    cifar.prepare(tmp_path, sha256=digest)


def test_a_name_that_is_never_resolved_is_given_up(monkeypatch):
  """`urlopen` does not count the time that looking up a name takes."""
  done = threading.Event()
  monkeypatch.setattr(
    cifar.urllib.request, 'urlopen', lambda *_, **__: done.wait(10)
  )
  try:
    with pytest.raises(TimeoutError, match=r'no answer in 0\.1 s'):
      cifar._open('http://nowhere.example', 0.05)
  finally:
    done.set()
