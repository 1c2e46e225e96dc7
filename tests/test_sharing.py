"""Model cards, the Hugging Face Hub, and W&B, whose real clients are used.

The Hub is a server of this machine. W&B writes offline.
"""

import base64
import contextlib
import http.server
import importlib.machinery
import json
import logging
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import types

import conftest
import numpy as np
import pytest
from golden import make_diffusers as golden
from PIL import Image

from configs import base
from ddpm_jax import errors
from ddpm_jax import flags
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax import validate
from ddpm_jax.evaluation import record
from ddpm_jax.interop import card
from ddpm_jax.interop import hub
from ddpm_jax.parallel import processes
from ddpm_jax.storage import boards
from ddpm_jax.storage import metrics_log

BOUND = {
  'bits_per_dim': 3.70123,
  'standard_error': 0.0123,
  'step': 0,
  'weights': 'EMA',
  'data': 'flowers',
  'split': 'all',
  'images': 2000,
  'times_an_image': 11,
  'exact_in_t': False,
  'variance': 'beta',
  'seed': 3,
}
SAMPLED = {
  'step': 0,
  'weights': 'EMA',
  'sampler': 'ddim',
  'sampler_steps': 50,
  'sampler_options': {'guidance': 2.0},
  'seed': 4,
}
FID = {
  **SAMPLED,
  'resize': 'tensorflow',
  'inception': '1a2b',
  'samples': 50000,
  'reference': 'flowers all, 2000 images',
  'scores': {
    'FID': 3.1712,
    'IS': 9.46,
    'IS_deviation': 0.11,
    'KID': 0.00123,
    'KID_error': 0.0001,
    'KID_images': 10000,
    'precision': 0.71,
    'recall': 0.61,
  },
}
SMALL = {
  **SAMPLED,
  'fake_images': 1000,
  'real_images': 1500,
  'frechet_distance': 1.25,
  'held_out_frechet_distance': 0.5,
  'precision': 0.9,
  'recall': 0.8,
}


def convert(*args):
  main.run(['--mode=convert', *(str(arg) for arg in args)])


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run with classes, samples and scores; its data are in a secret place."""
  folder = tmp_path_factory.mktemp('sharing') / 'run'
  convert(
    *(f'--input={golden.FOLDER / "label"}', f'--output={folder}'),
    *('--config.condition.classes=3', '--config.data.name=folder'),
    '--config.data.path=/home/secret/flowers',
  )
  Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(folder / 'samples.png')
  files = {
    'classes.json': ['rose', 'a|b `c`\n<d>', 'tulip'],
    'evaluation.json': {
      record.BOUNDS: [BOUND, {'step': 1}],
      record.SCORES: [FID],
    },
    'score.json': {'scores': [SMALL]},
    'changes.json': [
      {'step': 7, 'time': 'now', 'optimizer.learning_rate': [0.1, 0.2]}
    ],
  }
  for name, values in files.items():
    (folder / name).write_text(json.dumps(values))
  return folder


@pytest.fixture(scope='module')
def exported(run):
  folder = run.parent / 'theirs'
  convert(f'--workdir={run}', f'--output={folder}')
  return folder


def test_the_card_says_how_the_model_was_made_and_measured(exported):
  text = (exported / 'README.md').read_text()
  for part in (
    '# theirs\n',
    'A class-conditional denoising diffusion probabilistic model',
    '![Samples](samples.png)',
    '- Data: `flowers` (folder)',
    '- Steps: 0, of ',
    '- Step 0: weights that were trained elsewhere',
    '- Changed from step 7 on: `optimizer.learning_rate`',
    '  - 1: `a|b _c_ <d>`',
    "condition.name = 'label'",
    'model.channels = 4',
    '| 3.701 ± 0.012 bits/dim (upper bound) | 0 | 2,000 images of flowers, '
    'split all, t = 1 and 10 drawn t, EMA weights, variance beta, seed 3 |',
    '| FID 3.17, IS 9.46 ± 0.11, KID 0.00123 ± 0.00010, precision 0.710, '
    'recall 0.610 | 0 | 50,000 samples against flowers all, 2000 images, EMA '
    'weights, ddim, 50 steps, guidance 2, seed 4, resize tensorflow, Inception '
    '1a2b, KID, precision and recall of 10,000 images |',
    '| Fréchet distance 1.250 (held-out real images: 0.500), precision 0.900, '
    'recall 0.800 | 0 | 1,000 samples against 1,500 images of the data',
    "DDPMPipeline.from_pretrained('theirs')",
    '## License\n\nTo fill in',
  ):
    assert part in text, part
  # Neither places of this machine, nor keys that say nothing of the model.
  for part in ('secret', str(exported.parent), 'checkpoint.', 'log.wandb'):
    assert part not in text, part
  samples = (exported / 'samples.png').read_bytes()
  assert samples == (exported.parent / 'run' / 'samples.png').read_bytes()


def test_the_card_is_one_to_the_hub(exported):
  huggingface_hub = pytest.importorskip('huggingface_hub')
  found = huggingface_hub.ModelCard.load(exported / 'README.md')
  assert found.data.to_dict() == {
    'license': 'unknown',
    'library_name': 'diffusers',
    'pipeline_tag': 'unconditional-image-generation',
    'tags': ['ddpm', 'diffusion', 'ddpm_jax'],
  }
  assert found.text.lstrip().startswith('# theirs')


def test_the_data_set_and_the_license_are_named_to_the_hub():
  yaml = pytest.importorskip('yaml')
  keys = recipe.flatten(recipe.shipped('cifar'))
  keys['data.tfds'] = 'lsun/church:3.1.0'
  model = card.Model('me/a', keys, 1, 'EMA', 2, license='cc-by-4.0')
  first, *lines, last, _ = card.front_matter(model)
  assert first == last == '---'
  found = yaml.safe_load('\n'.join(lines))
  assert found['datasets'] == ['lsun']
  assert found['license'] == 'cc-by-4.0'


def test_the_commands_of_the_card_are_right(exported, tmp_path, monkeypatch):
  monkeypatch.chdir(exported.parent)
  text = (exported / 'README.md').read_text()
  (code,) = re.findall(r'```bash\npython -m ddpm_jax.main (.*?)```', text, re.S)
  again = tmp_path / 'again'
  words = shlex.split(code.replace('\\\n', ''))
  assert '--output=runs/theirs' in words
  main.run([*words, f'--output={again}'])
  assert recipe.resolve(None, again, {}).condition.classes == 3
  for block in re.findall(r'```python\n(.*?)```', text, re.S):
    compile(block, 'README.md', 'exec')


def test_a_run_without_scores_or_samples_has_a_card(run, tmp_path, caplog):
  bare = tmp_path / 'run'
  shutil.copytree(run, bare)
  for name in ('samples.png', 'classes.json', 'imported.json', 'score.json'):
    (bare / name).unlink()
  (bare / 'evaluation.json').write_text('{')
  (bare / 'changes.json').write_text('[[')
  out = tmp_path / 'out'
  convert(f'--workdir={bare}', f'--output={out}', '--license=mit')
  text = (out / 'README.md').read_text()
  assert 'None were measured.' in text
  assert 'samples.png' not in text
  assert not (out / 'samples.png').exists()
  assert text.startswith('---\nlicense: mit\n')
  assert '## License\n\n`mit`\n' in text
  assert len(caplog.records) == 2  # of the damaged files


@pytest.mark.parametrize(
  'name',
  [
    *('hf://', 'hf://a', 'hf://a/', 'hf://a/b/c', 'hf:/a/b', 'HF://a/b'),
    *('hf://a b/c', 'hf://a/b ', 'hf://a/b\n', 'hf://a/é', 'hf://a/b@main'),
    *('hf://-a/b', 'hf://a/b.', 'hf://a/b--c', 'hf://a/..', 'hf://a/b.git'),
    'hf://a/' + 'b' * 96,
  ],
)
def test_names_that_the_hub_would_refuse_are_refused_at_once(name):
  with pytest.raises(errors.UserError, match='write hf://USER/NAME'):
    convert('--workdir=no', f'--output={name}')
  with pytest.raises(errors.UserError, match='hf://USER/NAME'):
    hub.parse(name)


def test_what_the_hub_takes_is_not_refused():
  assert hub.parse('hf://A_b/c-d.e2') == 'A_b/c-d.e2'
  assert 'hf://USER/NAME' in flags.parser('convert').format_help()


@pytest.mark.parametrize(
  ('args', 'told'),
  [
    (['--input=x', '--output=hf://me/a'], r'is for --workdir=RUN'),
    (['--input=x', '--output=y', '--license=mit'], 'leave it out'),
    (['--workdir=x', '--output=y', '--license=MIT!'], 'such as mit'),
  ],
)
def test_flags_that_do_not_fit_are_refused(args, told):
  with pytest.raises(errors.UserError, match=told):
    convert(*args)


def test_the_hub_needs_its_package(monkeypatch, run):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(errors.UserError, match=r"pip install -e '.\[hub\]', or "):
    convert(f'--workdir={run}', '--output=hf://me/a')


class Hub(http.server.BaseHTTPRequestHandler):
  """As much of the Hub as an upload needs; it keeps what it is sent."""

  protocol_version = 'HTTP/1.1'

  def log_message(self, *_):
    pass

  def answer(self):
    size = int(self.headers.get('Content-Length') or 0)
    body = self.rfile.read(size)
    code, found = self.server.handle_call(self.command, self.path, body)
    text = json.dumps(found).encode()
    self.send_response(code)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(text)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(text)

  do_GET = do_HEAD = do_POST = answer


class Server(http.server.ThreadingHTTPServer):
  def __init__(self):
    super().__init__(('127.0.0.1', 0), Hub)
    self.url = f'http://127.0.0.1:{self.server_port}'
    self.created, self.message, self.files, self.code = [], None, {}, 200

  def handle_call(self, method, path, body):
    if path == '/api/repos/create':
      if self.code != 200:
        return self.code, {'error': 'no'}
      about = json.loads(body)
      self.created.append(about)
      name = f'{about["organization"]}/{about["name"]}'
      return 200, {'url': f'{self.url}/{name}'}
    if path == '/api/models/me/flowers/preupload/main':
      paths = [file['path'] for file in json.loads(body)['files']]
      how = {'uploadMode': 'regular', 'shouldIgnore': False}
      return 200, {'files': [{'path': path, **how} for path in paths]}
    if path == '/api/models/me/flowers/commit/main':
      for line in body.splitlines():
        value = json.loads(line)['value']
        if 'path' in value:
          self.files[value['path']] = base64.b64decode(value['content'])
        else:
          self.message = value['summary']
      return 200, {
        'commitUrl': f'{self.url}/me/flowers/commit/1a',
        'commitOid': '1a',
      }
    if path == '/api/validate-yaml':
      import yaml

      _, matter, _ = json.loads(body)['content'].split('---\n', 2)
      return 200 if yaml.safe_load(matter)['license'] else 400, {}
    return (200 if method == 'HEAD' else 404), {}


@pytest.fixture
def server(monkeypatch, tmp_path):
  constants = pytest.importorskip('huggingface_hub.constants')
  monkeypatch.chdir(tmp_path)  # `runs` is made here
  with Server() as server:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, 'ENDPOINT', server.url)
    monkeypatch.setattr('huggingface_hub.get_token', lambda: 'hf_x')
    monkeypatch.setenv('HF_TOKEN', 'hf_x')
    yield server
    server.shutdown()
    thread.join()


def test_a_run_is_pushed_with_its_card(run, exported, server, capfd):
  convert(f'--workdir={run}', '--output=hf://me/flowers')
  (created,) = server.created
  assert (created['organization'], created['name']) == ('me', 'flowers')
  assert server.message == 'The EMA weights of step 0'
  local = {
    str(path.relative_to(exported)): path.read_bytes()
    for path in exported.rglob('*')
    if path.is_file()
  }
  assert server.files.keys() == local.keys()
  card = server.files.pop('README.md').decode()
  assert card == local.pop('README.md').decode().replace(
    "from_pretrained('theirs')", "from_pretrained('me/flowers')"
  ).replace('--input=theirs', '--input=me/flowers').replace('theirs', 'flowers')
  assert server.files == local
  said = capfd.readouterr().err
  assert f'with a model card: {server.url}/me/flowers' in said
  assert 'to fill in: the license' in said
  # It is not left on this machine, so that it can be pushed again.
  assert not list(pathlib.Path('runs').iterdir())
  convert(f'--workdir={run}', '--output=hf://me/flowers', '--license=mit')
  assert server.files['README.md'].startswith(b'---\nlicense: mit\n')


KEPT = pathlib.Path('runs/flowers_diffusers')


def refused(run):
  """Pushes in vain, within seconds; returns the message."""
  before = time.monotonic()
  with pytest.raises(errors.RunError) as caught:
    convert(f'--workdir={run}', '--output=hf://me/flowers')
  assert time.monotonic() - before < 20
  message = str(caught.value)
  assert '\n' not in message
  assert f'the model and its card are in {KEPT}; to upload them: ' in message
  assert (KEPT / 'model_index.json').exists()
  assert 'me/flowers' in (KEPT / 'README.md').read_text()
  return message


UPLOAD = f'hf upload me/flowers {KEPT}'


def test_without_a_token_it_is_written_here(run, server, monkeypatch):
  monkeypatch.setattr('huggingface_hub.get_token', lambda: None)
  message = refused(run)
  assert message.startswith('there is no token')
  assert message.endswith(f'hf auth login && {UPLOAD}')
  assert not server.created
  # What is there is not lost.
  with pytest.raises(errors.UserError, match=rf'exists already.*`{UPLOAD}`'):
    convert(f'--workdir={run}', '--output=hf://me/flowers')


@pytest.mark.parametrize('code', [401, 403, 500])
def test_what_the_hub_refuses_is_written_here(run, server, code):
  server.code = code
  message = refused(run)
  assert f'{server.url} did not take the model' in message
  login = 'hf auth login && ' * (code in (401, 403))
  assert message.endswith(f': {login}{UPLOAD}')


@pytest.mark.parametrize('answers', ['refuses', 'is silent', 'is no server'])
def test_without_a_network_it_is_written_here(
  run, server, answers, monkeypatch
):
  monkeypatch.setattr(hub, 'TIMEOUT', 0.5)
  with socket.create_server(('127.0.0.1', 0)) as listening:
    port = listening.getsockname()[1]
    if answers == 'refuses':
      listening.close()
    if answers == 'is no server':

      def chatter():
        with contextlib.suppress(OSError):
          connection, _ = listening.accept()
          with connection:
            connection.sendall(b'SSH-2.0\r\n')

      threading.Thread(target=chatter, daemon=True).start()
    monkeypatch.setattr(
      'huggingface_hub.constants.ENDPOINT', f'http://127.0.0.1:{port}'
    )
    assert refused(run).endswith(UPLOAD)


def test_offline_by_choice_asks_no_server(run, server, monkeypatch):
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
  assert 'OfflineModeIsEnabled' in refused(run)
  assert not server.created


# W&B.


class Fake(types.ModuleType):
  """A package `wandb` that keeps what it is given, or fails."""

  def __init__(self, fails=''):
    super().__init__('wandb')
    self.__spec__ = importlib.machinery.ModuleSpec('wandb', None, origin='here')
    self.fails, self.calls, self.logged = fails, [], []
    self.offline, self.url, self.dir = False, 'http://here', ''

  def call(self, name):
    self.calls.append(name)
    if name == self.fails:
      raise OSError('no network')

  def Settings(self, **settings):
    return settings

  def Image(self, image):
    self.call('Image')
    return image.size

  def init(self, **given):
    self.given = given
    self.call('init')
    return self

  def define_metric(self, *_, **__):
    self.call('define_metric')

  def log(self, values):
    self.call('log')
    self.logged.append(values)

  def finish(self, exit_code):
    self.call('finish')
    self.exit_code = exit_code


@pytest.fixture
def fake(monkeypatch):
  fake = Fake()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  return fake


def log_to(folder, start=0, project='mine'):
  """Logs as a run of three steps does."""
  Image.new('RGB', (4, 2)).save(folder / 'samples.png')
  with (
    boards.opened(folder, start, project=project, config={'seed': 1}) as board,
    metrics_log.opened(folder, board, start, 4) as log,
  ):
    for step in range(start + 1, start + 4):
      log.write(step, {'loss': 1 / step}, float(step))
    log.sync()
    files = {'samples': folder / 'samples.png', 'none': folder / 'none.png'}
    board.pictures(start + 3, files)
  lines = metrics_log.read(folder / 'metrics.jsonl')
  assert [line['step'] for line in lines] == list(range(1, start + 4))


def test_wandb_gets_the_lines_and_a_resumed_run_continues(fake, tmp_path):
  log_to(tmp_path)
  lines = metrics_log.read(tmp_path / 'metrics.jsonl')
  assert fake.logged == [*lines, {'step': 3, 'samples': (4, 2)}]
  assert fake.given['project'] == 'mine'
  assert fake.given['config'] == {'seed': 1}
  assert fake.given['resume'] is None
  assert fake.exit_code == 0
  first = fake.given['id']
  log_to(tmp_path, 3, 'another')
  assert (fake.given['id'], fake.given['resume']) == (first, 'allow')
  # A run that begins again, or whose wandb.json is damaged, is another one.
  log_to(tmp_path)
  second = fake.given['id']
  (tmp_path / 'wandb.json').write_text('{')
  log_to(tmp_path, 3)
  assert len({first, second, fake.given['id']}) == 3
  assert fake.given['resume'] is None


def test_a_run_that_fails_has_failed_there_too(fake, tmp_path):
  board = boards.opened(tmp_path, 0, project='mine', config={})
  with pytest.raises(ZeroDivisionError), board:
    _ = 1 / 0
  assert fake.exit_code == 1


@pytest.mark.parametrize(
  'call', ['init', 'define_metric', 'log', 'Image', 'finish']
)
def test_wandb_that_fails_is_one_warning(fake, tmp_path, call, caplog):
  fake.fails = call
  log_to(tmp_path)
  (record,) = caplog.records
  assert record.levelno == logging.WARNING
  assert 'W&B failed (OSError: no network): the run continues' in record.message
  assert fake.calls.count(call) == 1


def test_one_process_logs_and_only_where_it_is_asked_for(
  fake, tmp_path, monkeypatch
):
  log_to(tmp_path, project='')
  monkeypatch.setattr(processes, 'is_primary', lambda: False)
  with boards.opened(tmp_path, 0, project='mine', config={}) as board:
    board.scalars(1, {'loss': 1.0})
  assert not fake.calls
  assert not (tmp_path / 'wandb.json').exists()


def test_a_project_that_cannot_be_logged_to_is_refused(monkeypatch, fake):
  config = base.get_config()
  validate.wandb(config)
  for name in ('a/b', 'a\\b', 'a#', 'a?', '50%', 'a:b', 'a\n', 'a' * 129):
    config.log.wandb = name
    with pytest.raises(errors.UserError, match='is not the name of a W&B'):
      validate.wandb(config)
  config.log.wandb = 'digits, second try'
  validate.wandb(config)
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(errors.UserError) as caught:
    validate.wandb(config)
  assert str(caught.value) == (
    'config.log.wandb=digits, second try needs the package wandb: pip install '
    "-e '.[wandb]', or set --config.log.wandb=''"
  )
  with pytest.raises(errors.UserError, match='needs the package wandb'):
    main.run([f'--config={conftest.DIGITS}', '--config.log.wandb=mine'])
  # Only training logs.
  validate.check(config)


def test_wandb_may_be_set_for_a_run_that_has_begun():
  config, begun = base.get_config(), base.get_config()
  config.log.wandb = 'mine'
  recipe.check_same(config, begun, 'here')


def records(path):
  """The records of a .wandb file: blocks of 32 KB in LevelDB's log format."""
  pb2 = pytest.importorskip('wandb.proto.wandb_internal_pb2')
  data, at, parts = path.read_bytes(), 7, []
  while at + 7 <= len(data):
    left = 2**15 - at % 2**15
    if left < 7:
      at += left
      continue
    size, kind = int.from_bytes(data[at + 4 : at + 6], 'little'), data[at + 6]
    parts.append(data[at + 7 : at + 7 + size])
    at += 7 + size
    if kind in (1, 4):  # whole, or the last part
      found = pb2.Record()
      found.ParseFromString(b''.join(parts))
      yield found
      parts = []


def history(folder):
  """What W&B has logged in a folder of one of its offline runs."""
  (path,) = folder.glob('*.wandb')
  for found in records(path):
    if found.HasField('history'):
      yield {
        item.key or '.'.join(item.nested_key): json.loads(item.value_json)
        for item in found.history.item
      }


def test_the_real_wandb_logs_offline_and_resumes(tmp_path, env):
  pytest.importorskip('wandb')
  workdir = tmp_path / 'run'
  env = {k: v for k, v in env.items() if not k.startswith('WANDB_')}
  env |= {'WANDB_MODE': 'offline', 'HOME': str(tmp_path)}
  for steps in (4, 6):
    process = subprocess.run(
      [
        *(sys.executable, '-m', 'ddpm_jax.main', *conftest.TINY),
        *(f'--config.steps={steps}', f'--workdir={workdir}'),
        *('--config.log.wandb=mine', '--config.log.pictures_every=3'),
      ],
      env=env,
      capture_output=True,
      text=True,
      check=True,
    )
    assert (
      'W&B                  offline; to upload: wandb sync' in process.stderr
    )
    assert 'W&B failed' not in process.stderr
  (run_id,) = {
    path.name.rpartition('-')[2] for path in workdir.glob('wandb/offline-run-*')
  }
  assert json.loads((workdir / 'wandb.json').read_text())['id'] == run_id
  first, second = sorted(workdir.glob('wandb/offline-run-*'))
  lines = metrics_log.read(workdir / 'metrics.jsonl')
  for folder, steps, drawn in ((first, 4, [3, 4]), (second, 6, [6])):
    logged = list(history(folder))
    want = lines[:4] if steps == 4 else lines[4:]
    found = [x for x in logged if 'loss' in x]
    assert [{k: x[k] for k in y} for x, y in zip(found, want, strict=True)] == (
      want
    )
    assert [x['step'] for x in logged if 'samples.path' in x] == drawn
    assert len(list(folder.glob('files/media/images/*.png'))) == 2 * len(drawn)
