"""The program as a user runs it: real processes, real signals, real files."""

import errno
import json
import os
import pathlib
import shutil
import signal
import sys
import time

import chex
import conftest
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax.parallel import meshes
from ddpm_jax.storage import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = conftest.DIGITS
TINY = conftest.TINY
JOBS = {mode: command.load(mode).JOB for mode in command.modes()}
ELSEWHERE = {'engine': 'jit', 'data': 2, 'fsdp': 16, 'spatial': 1}


@pytest.fixture
def start(popen, env):
  """Starts the program as a user would.

  It calls nothing that is deprecated, be it with jit or pmap, new or resumed.
  """
  strict = {'PYTHONWARNINGS': 'error::DeprecationWarning'}
  program = [sys.executable, '-m', 'ddpm_jax.main']

  def start(*args, **more):
    return popen([*program, *map(str, args)], env | strict | more)

  return start


@pytest.fixture
def run(start):
  """Runs the program to its end: (exit code, stderr)."""

  def run(*args):
    process = start(*args)
    out, err = process.communicate(timeout=300)
    assert out == ''  # nothing here is for a script to read
    return process.returncode, err

  return run


def metrics(workdir):
  """The lines of the log, without what a clock has said."""
  lines = [
    json.loads(line)
    for line in (workdir / 'metrics.jsonl').read_text().splitlines()
  ]
  for line in lines:
    line.pop('images_per_second', None)
    assert line.pop('seconds') >= 0
    assert set(line) == {'step', 'loss', 'grad_norm', 'learning_rate'}
  return lines


def wait_for(condition, process):
  deadline = time.time() + 120
  while not condition():
    assert process.poll() is None, process.communicate()
    assert time.time() < deadline
    time.sleep(0.01)


def weights(workdir):
  """All that the newest checkpoint holds, on one device."""
  config = recipe.resolve(None, workdir, {'parallel.data': '1'})
  state = meshes.abstract_state(
    lambda: build.init_state(config), build.mesh(config)
  )
  saved = checkpoint.restore(
    workdir / 'checkpoints',
    checkpoint.trained(state),
    state.ema_params,
  )
  return saved


def halve_arrays(workdir, step):
  for path in (workdir / 'checkpoints' / str(step)).rglob('d/*'):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def assert_equal(a, b):
  """To the last bit."""
  assert a.step == b.step
  assert a.data == b.data
  chex.assert_trees_all_equal((a.state, a.ema), (b.state, b.ema))


@pytest.mark.smoke
def test_a_run_leaves_what_the_readme_promises(tiny_run):
  workdir, err = tiny_run
  names = {path.name for path in workdir.iterdir()}
  assert names == {
    'checkpoints',
    'classes.json',
    'data.npz',
    'config.json',
    'loss.png',
    'metrics.jsonl',
    'progress.png',
    'samples.png',
    'tensorboard',
  }
  lines = metrics(workdir)
  assert [line['step'] for line in lines] == list(range(1, 201))
  assert np.mean([line['loss'] for line in lines[-20:]]) < 0.7
  rates = [line['learning_rate'] for line in lines]
  # That of the update itself: a warm-up of 5 steps, from 0.
  expected = 1e-3 * np.minimum(np.arange(200) / 5, 1)
  np.testing.assert_allclose(rates, expected, rtol=1e-6)
  text = (workdir / 'metrics.jsonl').read_text()
  times = [json.loads(line)['seconds'] for line in text.splitlines()]
  assert times == sorted(times)
  assert times[0] == 0 < times[-1]
  assert text.count('images_per_second') == 199  # all but the first step's
  events = [x.read_bytes() for x in (workdir / 'tensorboard').iterdir()]
  for name in (b'loss', b'learning_rate', b'samples', b'progress'):
    assert any(name in x for x in events)
  assert json.loads((workdir / 'config.json').read_text())['batch_size'] == 16
  assert checkpoint.steps(workdir / 'checkpoints') == [120, 160, 200]
  assert not list(workdir.rglob('*.part'))
  for name in ('samples.png', 'progress.png', 'loss.png'):
    with Image.open(workdir / name) as image:
      assert min(image.size) >= 90
    assert str(workdir / name) in err
  assert 'loss=' in err
  assert 'images/s=' in err
  assert '\r' not in err
  compiling = err.index('compiling the train step\n')
  assert compiling < err.index('compiled the train step in ')
  assert compiling < err.index('training: ')
  assert 'drawing: 9 images in ' in err


@pytest.mark.smoke
def test_the_command_printed_last_works(tiny_run, tmp_path):
  _, err = tiny_run
  command = err.strip().splitlines()[-1].split()
  assert command[:3] == ['python', '-m', 'ddpm_jax.main']
  output = tmp_path / 'out'
  main.run([*command[3:], '--num_samples=21', f'--output={output}'])
  assert len(list(output.glob('*.png'))) == 21


def test_the_same_images_in_every_format_and_batch(tiny_run, tmp_path):
  workdir, _ = tiny_run
  common = ['--mode=sample', f'--workdir={workdir}', '--num_samples=21']
  for output, size in (('a.npz', 256), ('b.npz', 8), ('c', 8), ('d.png', 8)):
    main.run(
      [
        *(*common, f'--output={tmp_path / output}'),
        f'--config.sampler.batch_size={size}',
      ]
    )
  a = np.load(tmp_path / 'a.npz')['images']
  assert a.shape == (21, 8, 8, 1)
  assert a.dtype == np.uint8
  np.testing.assert_array_equal(np.load(tmp_path / 'b.npz')['images'], a)
  files = sorted((tmp_path / 'c').glob('*.png'))
  c = np.stack([np.asarray(Image.open(path)) for path in files])
  np.testing.assert_array_equal(c, a[..., 0])
  with Image.open(tmp_path / 'd.png') as grid:
    assert grid.size[0] > 300
  main.run([*common, f'--output={tmp_path / "e.npz"}', '--seed=5'])
  e = np.load(tmp_path / 'e.npz')['images']
  assert np.mean(e != a) > 0.5


def test_a_run_stopped_killed_and_damaged_ends_as_the_undisturbed_run(
  tiny_run, start, run, tmp_path
):
  workdir = tmp_path / 'story'
  args = [*TINY, '--config.steps=200', f'--workdir={workdir}']
  process = start(*args)
  file = workdir / 'metrics.jsonl'
  wait_for(lambda: file.exists() and len(file.read_text()) > 2000, process)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  assert f'python -m ddpm_jax.main --workdir={workdir}' in err
  (*_, stopped) = checkpoint.steps(workdir / 'checkpoints')
  assert 10 < stopped < 120
  assert f'at step {stopped} of 200' in err

  process = start(*args)  # the same command again
  newest = workdir / 'checkpoints' / str(-(-stopped // 40) * 40 + 40)
  wait_for(newest.exists, process)
  process.kill()
  _, err = process.communicate()
  assert f'resuming from step {stopped}' in err
  with file.open('a') as log:
    log.write('{"step": 19')  # a line cut short
  before, damaged = checkpoint.steps(workdir / 'checkpoints')[-2:]
  halve_arrays(workdir, damaged)

  code, err = run(f'--workdir={workdir}', '--num_samples=9')
  assert code == 0, err
  assert f'{damaged} is damaged' in err
  assert f'resuming from step {before}' in err
  assert metrics(workdir) == metrics(tiny_run[0])
  assert_equal(weights(workdir), weights(tiny_run[0]))
  for name in ('samples.png', 'progress.png'):
    a, b = workdir / name, tiny_run[0] / name
    assert a.read_bytes() == b.read_bytes()


def test_a_user_who_lets_xla_optimise_trains_the_same(
  popen, user_env, tmp_path
):
  """All other tests ask the compiler for less."""
  args = [*TINY, '--config.steps=20']
  theirs, here = tmp_path / 'theirs', tmp_path / 'here'
  command = [sys.executable, '-m', 'ddpm_jax.main', *args]
  process = popen([*command, f'--workdir={theirs}'], user_env)
  main.run([*args, f'--workdir={here}'])
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  losses = [[x['loss'] for x in metrics(w)] for w in (theirs, here)]
  # Rounding, in sums of another order and in Adam's division.
  np.testing.assert_allclose(*losses, rtol=1e-4)
  assert len(losses[0]) == 20


def test_ctrl_c_is_answered_while_xla_compiles_and_a_second_one_quits(
  start, tmp_path
):
  workdir = tmp_path / 'early'
  cold = str(tmp_path / 'cache')
  args = [*conftest.UNET, f'--workdir={workdir}']
  process = start(*args, JAX_COMPILATION_CACHE_DIR=cold)
  lines = iter(process.stderr.readline, '')
  assert 'compiling the train step\n' in lines
  process.send_signal(signal.SIGINT)
  # The next line would be that it has compiled.
  assert next(lines) == 'stopping after this step; press again to quit\n'
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=60)
  assert (process.returncode, out, err) == (1, '', 'interrupted\n')
  assert not checkpoint.steps(workdir / 'checkpoints')


def test_the_history_of_the_losses_is_resumed_too(tmp_path, stop_at):
  few = ['--config.loss.t=importance', '--config.schedule.T=3']
  few += ['--config.sampler.steps=3']

  def trained(name, *steps):
    workdir = tmp_path / name
    for step in steps:
      stop_at(step)
      main.run([*TINY, *few, f'--workdir={workdir}', '--config.steps=99'])
    return workdir

  whole, parts = trained('whole', 9), trained('parts', 5, 9)
  assert metrics(whole) == metrics(parts)
  assert_equal(weights(whole), weights(parts))
  # The raw weights of such a run can be had, to evaluate them.
  config = recipe.resolve(None, whole, {'sampler.weights': 'raw'})
  kind, step, params = runs.restore(config, build.mesh(config), whole)
  assert (kind, step) == ('raw', 9)
  chex.assert_trees_all_equal(params, weights(whole).state['params'])
  # All t have a history: later draws, and so losses, follow from it.
  assert weights(whole).state['history'].seen.min() > 10


def test_a_finished_run_is_not_trained_again(tiny_run, tmp_path, capfd):
  workdir = shutil.copytree(tiny_run[0], tmp_path / 'finished')
  main.run([f'--workdir={workdir}', '--num_samples=9'])
  assert 'resuming from step 200' in capfd.readouterr().err
  assert metrics(workdir) == metrics(tiny_run[0])


def test_the_checkpoint_before_a_damaged_one_is_sampled(
  tiny_run, tmp_path, caplog, capfd
):
  workdir = shutil.copytree(tiny_run[0], tmp_path / 'damaged')
  halve_arrays(workdir, 200)
  main.run(['--mode=sample', f'--workdir={workdir}', '--num_samples=21'])
  assert 'is damaged' in caplog.text
  assert 'of step 160' in capfd.readouterr().err


@pytest.mark.smoke
def test_mistakes_are_one_line_and_exit_2(run):
  code, err = run('--config=configs/digit.py')
  assert code == 2
  assert err == (
    'error: no such config: configs/digit.py; did you mean configs/digits.py?\n'
  )


@pytest.fixture
def begun(tmp_path):
  """A workdir of the tiny recipe without checkpoints."""
  workdir = tmp_path / 'begun'
  workdir.mkdir()
  config = recipe.resolve(DIGITS, None, {})
  (workdir / 'config.json').write_text(json.dumps(recipe.to_json(config)))
  return workdir


def mistake(*args):
  """The message of the error that the arguments make; it must be one line."""
  with pytest.raises(errors.UserError) as caught:
    main.run([str(arg) for arg in args])
  message = str(caught.value)
  assert '\n' not in message
  return message


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--config=configs/none/digits.py'], 'no such config'),
    (['--config=configs'], 'is a folder'),
    (['--config=README.md'], 'README.md'),
    (['--config=configs/lsun.py:bedrom'], "did you mean 'bedroom'"),
    (['--mode=sampel'], "did you mean 'sample'"),
    (['--confg=configs/digits.py'], "did you mean '--config'"),
    (['--num_samples=0'], '--num_samples=0 must be at least 1'),
    (['--num_samples=ten'], 'ten'),
    (['--seed=-1'], '--seed=-1 must be at least 0 and at most 4294967295'),
    (['--mode=evaluate', '--step=-1'], '--step=-1 must be at least 0'),
    (['--mode=decompress', '--bytes=-1'], '--bytes=-1 must be at least 0'),
    (['--mode=edit', '--strength=nan'], '--strength=nan must be above 0'),
    (['--mode=edit', '--strength=much'], 'much'),
    ([], 'holds no run: choose a recipe'),
    ([f'--config={DIGITS}', '--config.modle.channels=8'], 'model.channels'),
    ([f'--config={DIGITS}', '--config.steps=many'], 'not of type int'),
    ([f'--config={DIGITS}', '--config.steps=1.5'], 'not of type int'),
    ([f'--config={DIGITS}', '--config.model=8'], 'config.model'),
    ([f'--config={DIGITS}', '--config.accumulate=3'], 'config.accumulate=3'),
    ([f'--config={DIGITS}', '--config.data.image_size=9'], '9x9'),
    ([f'--config={DIGITS}', '--config.data.image_size=big'], 'image_size'),
    ([f'--config={DIGITS}', '--config.data.name=digit'], "'digits'"),
    ([f'--config={DIGITS}', '--config.schedule.name=lin'], "'linear'"),
    ([f'--config={DIGITS}', '--config.schedule.beta_T=2.0'], 'beta'),
    ([f'--config={DIGITS}', '--config.loss.t=uniformly'], "'uniform'"),
    ([f'--config={DIGITS}', '--config.loss.name=simpel'], "'simple'"),
    ([f'--config={DIGITS}', '--config.sampler.name=sample'], 'ancestral'),
    (
      [f'--config={DIGITS}', '--config.sampler.steps=2000'],
      'config.sampler.steps=2000: ',
    ),
    (
      [
        *(f'--config={DIGITS}', '--config.schedule.T=1'),
        *(
          '--config.schedule.zero_terminal_snr=true',
          '--config.model.predict=v',
        ),
      ],
      'config.schedule.zero_terminal_snr: ',
    ),
    (
      [f'--config={DIGITS}', '--config.optimizer.ema=2'],
      'config.optimizer.ema=2 must be at least 0 and below 1',
    ),
    (
      [
        *(f'--config={DIGITS}', '--config.schedule.name=cosine'),
        '--config.schedule.beta_1=0.1',
      ],
      'config.schedule.beta_1=0.1 is not used by config.schedule.name=cosine: '
      'leave it out',
    ),
    ([f'--config={DIGITS}', '--config.sampler.variance=small'], 'beta_tilde'),
    ([f'--config={DIGITS}', '--config.checkpoint.every=0'], 'checkpoint.every'),
    ([f'--config={DIGITS}', '--config.model.predict=epsilon'], "'eps'"),
    ([f'--config={DIGITS}', '--config.model.variance=learned'], 'vlb'),
    ([f'--config={DIGITS}', '--config.loss.name=hybrid'], 'learned_range'),
    (
      [
        *(f'--config={DIGITS}', '--config.loss.name=min_snr'),
        '--config.model.predict=mu',
      ],
      'large t',
    ),
    (
      [
        *(f'--config={DIGITS}', '--config.loss.name=min_snr'),
        '--config.schedule.zero_terminal_snr=true',
        '--config.model.predict=v',
      ],
      'not be learned',
    ),
    (['--config=configs/ablation.py:eps'], 'eps_simple'),
    ([f'--config={DIGITS}', '--config.steps=-1'], 'steps'),
    ([f'--config={DIGITS}', f'--config.steps={10**30}'], 'at most 2147483647'),
    ([f'--config={DIGITS}', '--config.model.blocks=1000000'], 'at most 1000'),
    ([f'--config={DIGITS}', '--config.model.channels=0'], 'channels=0 must be'),
    ([f'--config={DIGITS}', f'--seed={"9" * 5000}'], 'invalid int value'),
    ([f'--config={DIGITS}', f'--num_samples={10**30}'], 'at most 2147483647'),
    (['--mode=sample', '--workdir=runs/none'], 'runs/none'),
    (['--mode=sample', f'--config={DIGITS}'], '--workdir'),
  ],
  ids=lambda x: ' '.join(x)[-40:] if isinstance(x, list) else '',
)
def test_mistakes_are_named_before_anything_is_begun(
  args, message, tmp_path, monkeypatch
):
  monkeypatch.chdir(ROOT)
  if '--workdir=runs/none' not in args and '--mode=sample' not in args:
    args = [*args, f'--workdir={tmp_path / "new"}']
  assert message in mistake(*args)
  assert not (tmp_path / 'new').exists()


def test_a_recipe_with_a_fault_is_named_with_its_line(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(
    'from configs import base\ndef get_config():\n'
    '  c = base.get_config()\n  c.modle = 1\n  return c\n'
  )
  message = mistake(f'--config={path}')
  assert f'{path}: line 4' in message
  assert 'modle' in message


def test_a_refusal_leaves_no_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert 'config.batch_size=3' in mistake(
    *(f'--config={DIGITS}', '--config.batch_size=3', '--config.accumulate=2')
  )
  assert not list(tmp_path.iterdir())


def test_a_workdir_that_is_a_file_or_inside_one(tmp_path):
  file = tmp_path / 'file'
  file.write_text('keep me')
  for workdir in (file, file / 'inside'):
    message = mistake(f'--config={DIGITS}', f'--workdir={workdir}')
    assert 'choose a folder' in message
  assert file.read_text() == 'keep me'


def test_a_workdir_that_cannot_be_written(monkeypatch, tmp_path):
  message = mistake(f'--config={DIGITS}', '--workdir=/proc/here')
  assert 'cannot write into /proc/here' in message


INTO_THE_RUN = [mode for mode in command.modes() if JOBS[mode].writes]


@pytest.mark.parametrize('mode', ['sample', 'edit', *INTO_THE_RUN])
def test_a_run_that_cannot_be_written_is_said_before_any_work(
  mode, begun, monkeypatch
):
  def read_only(**_):
    raise OSError(errno.EROFS, 'Read-only file system')

  monkeypatch.setattr('tempfile.TemporaryFile', read_only)
  message = mistake(f'--mode={mode}', f'--workdir={begun}')
  assert f'cannot write into {begun}: Read-only file system: ' in message
  elsewhere = mode not in INTO_THE_RUN
  assert ('set --output to another place' in message) == elsewhere


def test_another_recipe_under_an_existing_workdir(begun):
  # Damaged or not, it is a checkpoint of a run.
  (begun / 'checkpoints' / '40.damaged-1').mkdir(parents=True)
  message = mistake(f'--workdir={begun}', '--config.model.channels=64')
  assert 'model.channels (32 -> 64)' in message
  message = mistake(f'--workdir={begun}', '--seed=7')
  assert 'seed (0 -> 7)' in message


def test_a_run_without_a_checkpoint_is_begun_again(begun, stop_at, capfd):
  file = begun / 'config.json'
  config = json.loads(file.read_text())
  file.write_text(json.dumps(config | {'parallel': ELSEWHERE}))
  (begun / 'metrics.jsonl').write_text('{"step": 1, "loss": 7}\n' * 3)
  changes = [flag for flag in TINY if '--config=' not in flag]
  stop_at(1)
  main.run([f'--workdir={begun}', *changes, '--config.steps=2'])
  err = capfd.readouterr().err
  assert f'{begun} has no checkpoint: it is started again' in err
  saved = json.loads(file.read_text())
  assert saved['optimizer']['warmup'] == 5
  assert saved['parallel'] == ELSEWHERE  # the run's own
  assert len(metrics(begun)) == 1
  assert 'batch_size (16 -> 32)' in mistake(
    f'--workdir={begun}', '--config.batch_size=32'
  )


@pytest.mark.parametrize('mode', [m for m in command.modes() if JOBS[m].run])
def test_a_mode_of_a_run_asks_for_one(mode, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert mistake(f'--mode={mode}') == 'name a run: --workdir=runs/NAME'
  for i, name in enumerate('abcd'):
    workdir = tmp_path / 'runs' / name
    workdir.mkdir(parents=True)
    (workdir / 'config.json').write_text('{}')
    os.utime(workdir / 'config.json', (i, i))
  assert mistake(f'--mode={mode}').endswith('runs/d, runs/c, runs/b)')
  for folder in ('runs/e', 'runs'):  # not there, and another
    assert f'no run in {folder}:' in mistake(
      f'--mode={mode}', f'--workdir={folder}'
    )


def test_a_checkpoint_of_another_recipe(tiny_run, tmp_path):
  """Put there by hand: config.json says one thing, the checkpoint another."""
  workdir = tmp_path / 'mixed'
  shutil.copytree(tiny_run[0], workdir)
  config = json.loads((workdir / 'config.json').read_text())
  (workdir / 'config.json').write_text(json.dumps(config | {'seed': 5}))
  message = mistake(f'--workdir={workdir}', '--config.parallel.data=1')
  assert 'checkpoint 200 was started with another recipe' in message
  assert 'seed (0 -> 5)' in message
  config['model']['name'] = 'unet'
  (workdir / 'config.json').write_text(json.dumps(config))
  message = mistake(f'--workdir={workdir}', '--mode=sample')
  assert 'is of another model' in message


def test_a_damaged_config_json(begun):
  (begun / 'config.json').write_text('{"steps": ')
  assert 'config.json is damaged' in mistake(f'--workdir={begun}')


def test_sampling_without_a_checkpoint(begun):
  assert 'no checkpoint' in mistake('--mode=sample', f'--workdir={begun}')


def test_an_output_that_holds_other_images(begun, tmp_path):
  out = tmp_path / 'out'
  out.mkdir()
  (out / 'holiday.png').write_bytes(b'')
  common = ['--mode=sample', f'--workdir={begun}']
  assert 'holiday.png' in mistake(*common, f'--output={out}')
  assert 'choose a folder' in mistake(
    *common, f'--output={out / "holiday.png" / "x.npz"}'
  )


def test_a_folder_without_images(tmp_path):
  empty = tmp_path / 'empty'
  empty.mkdir()
  message = mistake(
    f'--config={ROOT}/configs/folder.py',
    f'--config.data.path={empty}',
    f'--workdir={tmp_path / "run"}',
  )
  assert str(empty) in message


def test_a_corrupt_image_is_named(tmp_path):
  (tmp_path / 'bad.png').write_bytes(b'\x89PNG\r\n\x1a\n broken')
  message = mistake(
    f'--config={ROOT}/configs/folder.py',
    f'--config.data.path={tmp_path}',
    f'--workdir={tmp_path / "run"}',
    '--config.data.max_unreadable=0',
  )
  assert 'bad.png' in message


def test_no_network_for_a_download(tmp_path, monkeypatch):
  monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
  monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')
  before = time.time()
  message = mistake(
    f'--config={ROOT}/configs/cifar.py',
    f'--config.data.path={tmp_path / "tfds"}',
    f'--workdir={tmp_path / "run"}',
  )
  assert time.time() - before < 60  # TFDS alone would try for 200 seconds
  assert 'cifar-10-binary.tar.gz' in message
