"""A run in a bucket, against a real server of object storage on loopback."""

import functools
import http.server
import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gcp_storage_emulator import exceptions
from gcp_storage_emulator import server as emulator
from gcp_storage_emulator import storage as emulated
from gcp_storage_emulator.handlers import buckets
from PIL import Image

from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax.storage import boards
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage import images
from ddpm_jax.storage import metrics_log
from ddpm_jax.storage import outputs
from ddpm_jax.storage import paths
from ddpm_jax.storage import results
from ddpm_jax.storage import workdir


class Handler(emulator.RequestHandler):
  """The emulator, with what it lacks.

  TensorStore tells two writers of one file apart by `x-goog-generation` in what
  is downloaded, and by the conditions `ifGenerationMatch` and
  `ifGenerationNotMatch`; gcsfs renames by `moveTo`. The buckets
  `forbidden` and `readonly` are not for us.
  """

  lock = threading.Lock()

  def parse_request(self):
    self.generation = None
    return super().parse_request()

  def _refused(self):
    """The status of a request that does not come through, or 0."""
    url = urllib.parse.urlparse(self.path)
    query = urllib.parse.parse_qs(url.query)
    bucket, name = re.search(r'/b/([^/]+)(?:/o/?([^/]*))?', url.path).groups()
    if bucket == 'forbidden' or (
      bucket == 'readonly' and self.command != 'GET'
    ):
      return 403
    name = query.get('name', [urllib.parse.unquote(name or '')])[0]
    try:
      found = self.storage.get_file_obj(bucket, name)['generation']
    except exceptions.NotFound:
      found = '0'
    if 'alt' in query and found != '0':
      self.generation = found
    if query.get('ifGenerationMatch', [found])[0] != found:
      return 412
    if found != '0' and query.get('ifGenerationNotMatch', [''])[0] == found:
      return 304
    return 0

  def _do(self, method):
    source, moved, target = self.path.partition('/moveTo/o/')
    if moved:  # gcsfs renames by it
      bucket, name = re.search(r'/b/([^/]+)/o/([^/]+)$', source).groups()
      self.path = f'{source}/copyTo/b/{bucket}/o/{target}'
    with self.lock:
      if status := '/b/' in self.path and self._refused():
        self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.send_response(status)
        self.send_header('Content-Length', '0')
        self.end_headers()
      else:
        emulator.Router(self).handle(method)
        if moved:
          self.storage.delete_file(bucket, urllib.parse.unquote(name))

  def do_GET(self):
    self._do('GET')

  def do_POST(self):
    self._do('POST')

  def do_DELETE(self):
    self._do('DELETE')

  def end_headers(self):
    if self.generation:
      self.send_header('x-goog-generation', self.generation)
    super().end_headers()


class Server(http.server.ThreadingHTTPServer):
  def handle_error(self, request, client_address):
    """A client that hangs up, as one that was killed does, is no news."""


@pytest.fixture(scope='module')
def endpoint():
  """What a program needs to know to find the server."""
  for name in ('gcp_storage_emulator', 'api.object'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  storage = emulated.Storage(use_memory_fs=True)
  for name in ('bucket', 'readonly'):
    buckets.create_bucket(name, storage)
  server = Server(('127.0.0.1', 0), functools.partial(Handler, storage))
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  url = f'http://127.0.0.1:{server.server_port}'
  yield {'STORAGE_EMULATOR_HOST': url, 'TENSORSTORE_GCS_HTTP_URL': url}
  server.shutdown()
  thread.join()
  server.server_close()


@pytest.fixture(scope='module')
def here(endpoint):
  """The server for this process."""
  with pytest.MonkeyPatch.context() as patch:
    for name, value in endpoint.items():
      patch.setenv(name, value)
    yield


@pytest.fixture
def folder(here, request):
  name = re.sub(r'\W', '_', request.node.name)
  return paths.path(f'gs://bucket/{name}')


@pytest.fixture
def empty(tmp_path, monkeypatch):
  """An empty working folder, which the test must leave empty."""
  monkeypatch.chdir(tmp_path)
  yield tmp_path
  assert list(tmp_path.iterdir()) == []


def test_local_paths_are_those_of_pathlib(tmp_path):
  for text in ('runs/a', '.', str(tmp_path), 'C', 'a:b', 'runs/12:30/x'):
    assert paths.path(text) == pathlib.Path(text)
    assert type(paths.path(text)) is type(pathlib.Path())


def test_TensorFlow_is_never_imported(folder):
  folder.exists()
  assert os.environ['EPATH_USE_TF'] == 'false'
  assert 'tensorflow' not in sys.modules


def test_a_path_of_a_bucket_is_like_one_of_pathlib(folder):
  folder.mkdir(parents=True, exist_ok=True)
  assert not folder.exists()
  assert list(folder.glob('*')) == []
  odd = folder / 'a name, with ü'
  for name in ('b.txt', 'a.txt', '.hidden', 'c.json'):
    (odd / name).write_text(f'{name}: x̂\n')
  (odd / 'below' / 'd.txt').write_bytes(b'')
  assert [path.name for path in odd.glob('*.txt')] == ['a.txt', 'b.txt']
  assert list(folder.glob('*/below')) == [odd / 'below']
  assert odd.is_dir()
  assert not odd.is_file()
  assert (odd / 'a.txt').is_file()
  assert not (odd / 'a.txt').is_dir()
  assert (odd / 'a.txt').read_text() == 'a.txt: x̂\n'
  assert odd.resolve() == odd.absolute() == odd
  assert str(odd.parent) == str(folder)
  (odd / 'a.txt').unlink()
  (odd / 'a.txt').unlink(missing_ok=True)
  assert not (odd / 'a.txt').exists()
  with pytest.raises(FileNotFoundError):
    (odd / 'a.txt').read_bytes()
  paths.remove_tree(odd)
  assert not folder.exists()


def test_what_another_program_has_written_is_seen(folder, endpoint):
  """Listings are not kept: TensorStore writes past gcsfs."""
  assert list(folder.glob('*')) == []
  code = (
    'from ddpm_jax.storage import paths; '
    f'paths.path({str(folder / "new")!r}).write_text("x")'
  )
  env = os.environ | endpoint | {'PYTHONPATH': str(conftest.ROOT)}
  subprocess.run([sys.executable, '-c', code], env=env, check=True)
  assert [path.name for path in folder.glob('*')] == ['new']


def test_half_a_file_is_never_sent(folder):
  def write():
    with paths.atomic_write(folder / 'a') as part:
      part.write_text('half')
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write()
  assert not (folder / 'a').exists()


def test_a_workdir_keeps_what_a_run_says_of_itself(folder):
  workdir.create(folder)
  assert workdir.read_config(folder) is None
  workdir.write_config(folder, {'a': [1, 2.5]})
  workdir.write_classes(folder, ['x', 'y'])
  assert workdir.read_config(folder) == {'a': [1, 2.5]}
  assert workdir.read_classes(folder) == ('x', 'y')
  workdir.check_run(folder)
  assert not workdir.has_checkpoint(folder)
  entry = {'how': 1, 'fid': 2}
  results.add(folder / 'e.json', 'scores', 'fid', entry, ['fid'])
  assert results.read(folder / 'e.json', 'scores', 'fid') == {
    'scores': [{'how': 1, 'fid': 2}]
  }


@pytest.mark.parametrize('name', ['samples', 'samples.png', 'samples.npz'])
def test_samples_go_into_a_bucket(folder, name):
  output = folder / name
  about = {'mode': 'sample', 'run': str(folder), 'steps': 10}
  drawn = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
  outputs.check(output, 5, about)
  outputs.save(output, iter([drawn[:3], drawn[3:]]), 5, about)
  outputs.check(output, 5, about)
  if name == 'samples':
    with pytest.raises(errors.UserError, match='made with other settings'):
      outputs.check(output, 5, about | {'steps': 20})
    files = sorted(output.glob('*.png'))
    found = [np.asarray(Image.open(file.open('rb'))) for file in files]
  elif name == 'samples.png':
    found = np.asarray(Image.open(output.open('rb')))
    drawn = images.grid(drawn)
  else:
    found = np.load(output.open('rb'))['images']
  np.testing.assert_array_equal(found, drawn)


def test_the_log_is_in_the_bucket_before_the_checkpoint(folder):
  """It is put as a whole: there is no append."""

  def steps():
    return [line['step'] for line in metrics_log.read(folder / 'metrics.jsonl')]

  with (
    boards.tensorboard(folder, 0) as board,
    metrics_log.opened(folder, board, 0, 4) as log,
  ):
    for step in (1, 2, 3):
      log.write(step, {'loss': 1 / step}, float(step))
    log.sync()
    assert steps() == [1, 2, 3]
    assert list((folder / 'tensorboard').glob('events*'))
    log.write(4, {'loss': 0.25}, 4.0)
  assert steps() == [1, 2, 3, 4]
  # Of a run that goes on from step 2.
  with metrics_log.opened(folder, boards.Board(), 2, 4) as log:
    assert steps() == [1, 2]
    log.write(3, {'loss': 0.5}, 1.0)
  assert steps() == [1, 2, 3]
  assert metrics_log.read(folder / 'metrics.jsonl')[-1]['seconds'] == 3.0


def test_a_log_grows_while_the_run_goes_on(folder, monkeypatch):
  file = paths.append(folder / 'log')
  monkeypatch.setattr(sys.modules[type(file).__module__], 'SECONDS', 0)
  file.write('a\n')
  deadline = time.monotonic() + 30
  while not (folder / 'log').exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  assert (folder / 'log').read_text() == 'a\n'
  file.close()


def state(value):
  return {'w': jnp.full((300,), float(value)), 'step': jnp.asarray(int(value))}


def save(checkpoints, step):
  checkpoint.save(
    checkpoints,
    step,
    state=state(step),
    ema=state(-step),
    data={'at': step},
    config={'steps': [step]},
  )


def test_checkpoints_are_saved_pruned_and_restored(folder, empty):
  path = folder / 'checkpoints'
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state(0.0),
  )
  assert checkpoint.steps(path) == []
  checkpoints = checkpoint.open(path, keep=2)
  for step in (1, 2, 3, 4):
    save(checkpoints, step)
  checkpoint.close(checkpoints)
  assert checkpoint.steps(path) == [3, 4]
  assert {found.name for found in path.glob('*')} == {'3', '4'}
  saved = checkpoint.restore(path, abstract, abstract)
  assert (saved.step, saved.data, saved.config) == (
    4,
    {'at': 4},
    {'steps': [4]},
  )
  np.testing.assert_array_equal(saved.state['w'], np.full(300, 4, np.float32))
  np.testing.assert_array_equal(saved.ema['w'], np.full(300, -4, np.float32))


def test_a_damaged_checkpoint_is_set_aside_and_saved_again(folder):
  path = folder / 'checkpoints'
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state(0.0),
  )
  checkpoints = checkpoint.open(path)
  for step in (1, 2):
    save(checkpoints, step)
  checkpoint.close(checkpoints)
  about = path / '2' / 'about' / 'data.json'
  about.write_bytes(about.read_bytes().replace(b'"at"', b'"it"'))
  checkpoints = checkpoint.open(path)
  assert checkpoint.restore(checkpoints, abstract, abstract).step == 1
  assert checkpoint.steps(path) == [1]
  names = sorted(found.name for found in path.glob('*'))
  assert [re.sub(r'\d{3,}', 'N', name) for name in names] == [
    '1',
    '2.damaged-N',
  ]
  assert workdir.has_checkpoint(folder)
  save(checkpoints, 2)
  checkpoint.close(checkpoints)
  assert checkpoint.restore(path, abstract, abstract).step == 2


def test_an_unfinished_save_is_none(folder):
  """A bucket has no rename: a save that has ended has a mark of its own."""
  path = folder / 'checkpoints'
  checkpoints = checkpoint.open(path)
  for step in (1, 2):
    save(checkpoints, step)
  checkpoint.close(checkpoints)
  (path / '2' / 'commit_success.txt').unlink()
  assert checkpoint.steps(path) == [1]
  checkpoints = checkpoint.open(path)
  save(checkpoints, 2)
  checkpoint.close(checkpoints)
  assert checkpoint.steps(path) == [1, 2]


TRAIN = [f'--config={conftest.DIGITS}']
BAD = {
  's3://bucket/run': 'not a supported path',
  'http://host/run': 'not a supported path',
  'hdfs://host/run': 'not a supported path',
  'file:///run': 'not a supported path',
  'gs:/bucket/run': 'not a supported path',
  'gs:bucket/run': 'not a supported path',
  'GS://bucket/run': 'not a supported path',
  ' gs://bucket/run': 'not a supported path',
  './gs://bucket/run': 'not a supported path',
  'gs://': 'write gs://BUCKET/NAME',
  'gs://bucket': 'write gs://BUCKET/NAME',
  'gs://bucket/': 'write gs://BUCKET/NAME',
  'gs:///run': 'write gs://BUCKET/NAME',
  'gs://bucket/a?b': "without '?'",
  'gs://bucket/a[1]': "without '['",
  'gs://bucket/a#b': "without '#'",
  'gs://bucket/gs://b': "without '://'",
  'gs://bucket/../run': 'write gs://BUCKET/NAME',
}
LOCAL = {
  'image': ['--mode=edit'],
  'mask': ['--mode=edit'],
  'to': ['--mode=edit'],
  'images': ['--mode=evaluate'],
  'inception': ['--mode=evaluate'],
  'reference': ['--mode=evaluate'],
  'prompts': ['--mode=sample'],
  'compare': ['--mode=benchmark'],
  'profile': ['--mode=benchmark'],
}


def refusal(*argv):
  with pytest.raises(errors.UserError) as caught:
    main.run(list(argv))
  line = str(caught.value)
  assert '\n' not in line
  return line


def test_weights_for_diffusers_are_not_written_into_a_bucket(folder):
  workdir.write_config(folder, {'a': 1})
  line = refusal(
    *('--mode=convert', f'--workdir={folder}', f'--output={folder}/out')
  )
  assert 'name a local folder' in line


@pytest.mark.parametrize('text', BAD)
@pytest.mark.parametrize('flag', ['workdir', 'output'])
def test_storage_that_cannot_be_used_is_refused(text, flag, empty):
  line = refusal(*TRAIN, '--mode=sample', f'--{flag}={text}')
  assert f'--{flag}' in line
  assert BAD[text] in line


@pytest.mark.parametrize('flag', LOCAL)
@pytest.mark.parametrize('text', ['gs://bucket/file', 's3://bucket/file'])
def test_what_is_read_from_this_machine_only_says_so(text, flag, empty):
  line = refusal(*LOCAL[flag], f'--{flag}={text}')
  assert f'--{flag}' in line
  assert text in line


@pytest.mark.parametrize('text', ['gs://bucket/data', 's3://bucket/data'])
@pytest.mark.parametrize('name', ['folder', 'arrays', 'tfds'])
def test_data_are_read_from_this_machine_only(text, name, empty):
  line = refusal(
    *TRAIN,
    f'--config.data.name={name}',
    f'--config.data.path={text}',
    '--workdir=w',
  )
  assert 'config.data.path' in line
  assert text in line


def test_a_bucket_that_is_missing_is_refused_and_not_made(here, empty):
  for argv in ([*TRAIN], ['--mode=sample']):
    line = refusal(*argv, '--workdir=gs://nowhere/run')
    assert 'there is no bucket nowhere' in line
  with pytest.raises(FileNotFoundError):
    paths.path('gs://nowhere/run').read_bytes()


def test_a_bucket_that_is_not_ours_is_refused(here, empty):
  line = refusal(*TRAIN, '--workdir=gs://forbidden/run')
  assert 'gs://forbidden/run cannot be read' in line
  assert 'credentials' in line
  with pytest.raises(errors.UserError, match=r'be written .*Forbidden'):
    workdir.check(paths.path('gs://readonly/run'))


def test_a_file_of_a_bucket_is_no_workdir(folder):
  folder.write_text('x')
  with pytest.raises(errors.UserError, match='is a file: name a folder'):
    workdir.check(folder)
  with pytest.raises(errors.UserError, match='is a file'):
    workdir.create(folder)


def test_gcsfs_is_named_where_it_is_missing(monkeypatch, empty):
  found = errors.importlib.util.find_spec
  monkeypatch.setattr(
    errors.importlib.util,
    'find_spec',
    lambda name: None if name == 'gcsfs' else found(name),
  )
  line = refusal(*TRAIN, '--workdir=gs://bucket/run')
  assert "pip install -e '.[gcs]'" in line
  assert '--workdir' in line


def lines(path):
  """Of a log, without what a clock has said."""
  found = [json.loads(line) for line in path.read_text().splitlines()]
  clock = ('seconds', 'images_per_second')
  return [{k: x for k, x in line.items() if k not in clock} for line in found]


@pytest.mark.slow
def test_a_run_in_a_bucket_is_that_of_a_folder(
  here, endpoint, tmp_path, tiny_run, env
):
  """Trained, stopped, gone on with, sampled from and evaluated."""
  undisturbed, _ = tiny_run
  bucket = paths.path('gs://bucket/whole')
  cwd = tmp_path / 'empty'
  cwd.mkdir()
  env = env | endpoint

  def start(*args):
    return subprocess.Popen(
      [sys.executable, '-m', 'ddpm_jax.main', f'--workdir={bucket}', *args],
      env=env,
      cwd=cwd,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(*args):
    process = start(*args)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return out + err

  process = start(*conftest.TINY, '--config.steps=200')
  try:
    deadline = time.monotonic() + 300
    while not checkpoint.steps(bucket / 'checkpoints'):
      assert process.poll() is None, process.communicate()
      assert time.monotonic() < deadline
      time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
  finally:
    process.kill()
  assert process.returncode == 0
  assert f'--workdir={bucket}' in err
  (stopped,) = map(int, re.findall(r'saved, at step (\d+) of 200', err))
  assert 40 <= stopped < 200
  assert [x['step'] for x in lines(bucket / 'metrics.jsonl')][-1] == stopped

  assert f'resuming from step {stopped}' in run('--num_samples=9')
  assert lines(bucket / 'metrics.jsonl') == lines(undisturbed / 'metrics.jsonl')
  for name in ('samples.png', 'progress.png'):
    assert (bucket / name).read_bytes() == (undisturbed / name).read_bytes()
  assert checkpoint.steps(bucket / 'checkpoints') == checkpoint.steps(
    undisturbed / 'checkpoints'
  )
  ends = [
    json.loads((where / 'checkpoints/200/about/data.json').read_text())
    for where in (bucket, undisturbed)
  ]
  assert ends[0]['arrays'] == ends[1]['arrays']  # fingerprints of all bytes

  run('--mode=sample', '--num_samples=3', f'--output={bucket}/more.npz')
  assert np.load((bucket / 'more.npz').open('rb'))['images'].shape[0] == 3
  run(
    '--mode=evaluate',
    '--config.evaluate.images=16',
    '--config.evaluate.draws=2',
  )
  assert 'bits_per_dim' in (bucket / 'evaluation.json').read_text()
  assert list(cwd.iterdir()) == []


def test_what_is_not_there_cannot_be_removed(folder):
  (folder / 'none').unlink(missing_ok=True)
  with pytest.raises(FileNotFoundError, match='no such object'):
    (folder / 'none').unlink()


def test_storage_that_fails_is_a_line_and_the_run_can_go_on(
  folder, monkeypatch
):
  file = folder / 'file'
  file.write_text('a')

  def fail(*_, **__):
    raise OSError('503\nService Unavailable')

  monkeypatch.setattr(file._fs, 'rm_file', fail, raising=False)
  with pytest.raises(errors.RunError, match='cannot use gs://') as error:
    file.unlink()
  assert '\n' not in str(error.value)


def test_a_file_is_given_another_name(folder, tmp_path):
  for path in (folder / 'a', tmp_path / 'a'):
    path.write_text('x')
    moved = paths.move(path, 'b')
    assert moved == path.with_name('b')
    assert moved.read_text() == 'x'
    assert not path.exists()
