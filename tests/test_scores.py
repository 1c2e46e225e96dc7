"""`--mode=evaluate` of samples and of images, by a small random network.

The scores mean nothing, and are scores all the same. tests/test_inception.py
holds the features of Inception itself.
"""

import contextlib
import json
import shutil
import socket
import sys
import threading
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
import small_inception
from test_inception import drawn

from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax.evaluation import features
from ddpm_jax.evaluation import record
from ddpm_jax.metrics import inception
from ddpm_jax.storage import images

REAL = inception.Inception
SHORT = [
  '--config.sampler.steps=4',
  '--config.sampler.batch_size=3',
  '--config.evaluate.images=5',
  '--config.parallel.data=1',
]


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """A file of random weights, of the network that is in Inception's place."""
  path = tmp_path_factory.mktemp('inception') / 'inception.safetensors'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(inception, 'Inception', small_inception.Inception)
    safetensors.numpy.save_file(drawn(), path)
    yield path


def command(workdir, weights, *more):
  return [
    *('--mode=evaluate', f'--workdir={workdir}', f'--inception={weights}'),
    *SHORT,
    *map(str, more),
  ]


def entries(workdir):
  return record.read(workdir)['scores_of_samples']


@pytest.fixture(scope='module')
def undisturbed(tiny_run, weights, tmp_path_factory):
  """A run that was scored in one go, and its 7 samples: (workdir, .npz)."""
  workdir = tmp_path_factory.mktemp('scored') / 'runs' / 'one'
  shutil.copytree(tiny_run[0], workdir)
  output = workdir.parent / 'samples.npz'
  args = command(workdir, weights, '--num_samples=7', f'--output={output}')
  main.run(args)
  return workdir, output


@pytest.fixture
def start(popen, env):
  """Starts the program with the small network."""
  program = [sys.executable, small_inception.__file__]
  return lambda *args: popen([*program, *args], env)


def test_exactly_so_many_images_are_drawn_and_scored(undisturbed, tmp_path):
  """Batches of 3 do not divide 7."""
  workdir, output = undisturbed
  (entry,) = entries(workdir)
  assert entry['samples'] == 7
  assert {'FID@7', 'sFID@7', 'IS', 'KID', 'precision'} <= set(entry['scores'])
  assert 'FID' not in entry['scores']
  assert entry['scores']['KID_images'] == 5  # there are no more real ones
  for key, value in {
    'step': 200,
    'weights': 'EMA',
    'sampler': 'ancestral',
    'sampler_steps': 4,
    'reference': 'digits all, 5 images',
    'resize': 'tensorflow',
  }.items():
    assert entry[key] == value
  assert not list(workdir.glob('evaluation_parts*'))
  # They are those that --mode=sample draws.
  args = ['--mode=sample', f'--workdir={workdir}', '--num_samples=7', *SHORT]
  main.run([*args, f'--output={tmp_path / "drawn.npz"}'])
  drawn = np.load(tmp_path / 'drawn.npz')['images']
  scored = np.load(output)['images']
  assert scored.shape == (7, 8, 8, 1)
  # Another program: a rounding may carry a value over the edge of two grays.
  assert np.abs(drawn.astype(int) - scored).max() <= 1


@contextlib.contextmanager
def watched(paths):
  """Gives {path: when it was written}, as seen while the block runs."""
  seen, done = {}, threading.Event()

  def look():
    while not done.is_set():
      for path in paths:
        with contextlib.suppress(FileNotFoundError):
          seen.setdefault(path, set()).add(path.stat().st_mtime_ns)
      time.sleep(0.005)

  thread = threading.Thread(target=look)
  thread.start()
  try:
    yield seen
  finally:
    done.set()
    thread.join()


def test_a_run_that_was_killed_and_resumed_has_the_same_scores(
  undisturbed, tiny_run, weights, start, capsys, tmp_path
):
  workdir = tmp_path / 'runs' / 'killed'
  shutil.copytree(tiny_run[0], workdir)
  shutil.copytree(
    undisturbed[0].parent / 'reference', tmp_path / 'runs' / 'reference'
  )
  args = command(workdir, weights, '--num_samples=7')
  args.append(f'--output={tmp_path / "samples.npz"}')
  process = start(*args)
  deadline = time.monotonic() + 120
  while not (done := list(workdir.glob('evaluation_parts_*/*-*.npz'))):
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.005)
  process.kill()
  process.wait()
  assert not (workdir / 'evaluation.json').exists()
  made = {path: {path.stat().st_mtime_ns} for path in done}
  with watched(made) as seen:
    main.run(args)
  out, err = capsys.readouterr()
  assert f'resuming after {3 * len(done)} images' in err
  assert seen == made  # not made again
  assert entries(workdir) == entries(undisturbed[0])
  assert '| 200 | EMA | ancestral, 4 steps | 7 |' in out


def test_checkpoints_are_compared_and_the_bound_stays(
  undisturbed, weights, capsys, tmp_path
):
  workdir = tmp_path / 'runs' / 'two'
  shutil.copytree(undisturbed[0], workdir)
  reference = undisturbed[0].parent / 'reference'
  shutil.copytree(reference, tmp_path / 'runs' / 'reference')
  (kept,) = (tmp_path / 'runs' / 'reference').iterdir()
  made = kept.stat().st_mtime_ns
  bound = [
    '--mode=evaluate',
    f'--workdir={workdir}',
    '--config.evaluate.images=4',
  ]
  main.run([*bound, '--config.evaluate.draws=2', '--step=160'])
  capsys.readouterr()
  args = command(workdir, weights, '--num_samples=7', '--step=160')
  main.run([*args, '--config.evaluate.neighbours=10000'])
  out = capsys.readouterr().out
  assert kept.stat().st_mtime_ns == made  # computed once
  (found,) = record.read(workdir)['bounds']
  assert found['step'] == 160
  assert found['bits_per_dim'] > 0
  a, b = sorted(entries(workdir), key=lambda e: e['step'])
  assert (a['step'], b['step']) == (160, 200)
  assert a['scores'] != b['scores']
  best = min(a, b, key=lambda e: e['scores']['FID@7'])
  assert f'best of 2: FID@7 {best["scores"]["FID@7"]:.3f} at step' in out
  assert 'FID ' not in out.replace('best', '')

  main.run(['--mode=compare', f'--workdir={workdir.parent}'])
  out = capsys.readouterr().out
  lines = [line.strip('| ').split(' | ') for line in out.splitlines()]
  (row,) = (x for x in lines if x[:3] == ['two', '160', 'digits'])
  assert row[:7] == ['two', '160', 'digits', 'EMA', 'all', '4', '2']
  assert f'{found["bits_per_dim"]:.3f}' in row
  rows = [line.split(' | ') for line in out.splitlines() if 'FID@7' in line]
  assert [row[1:3] for row in rows] == [['160', 'EMA'], ['200', 'EMA']]
  assert [float(row[-2].split()[1]) for row in rows] == pytest.approx(
    [x['scores']['FID@7'] for x in (a, b)], abs=0.005
  )


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
  """Five pieces of a photograph, RGB: (.npz, folder of the same)."""
  from sklearn import datasets

  photo = datasets.load_sample_images().images[0]
  pieces = np.stack([photo[30 * i :, 90 * i :][:24, :32] for i in range(5)])
  folder = tmp_path_factory.mktemp('photographs')
  images.save_npz(folder / 'all.npz', pieces)
  (folder / 'png').mkdir()
  for i, piece in enumerate(pieces):
    images.save_png(folder / 'png' / f'{i}.png', piece)
  return folder / 'all.npz', folder / 'png'


def scores_of(path, data, weights, cache, *more):
  output = cache / 'scores.json'
  main.run([
    *('--mode=evaluate', '--config=configs/folder.py', f'--images={path}'),
    *('--config.data.name=arrays', f'--config.data.path={data}'),
    *('--config.data.image_size=(24,32)', f'--inception={weights}'),
    *(f'--config.evaluate.cache={cache}', f'--output={output}'),
    *('--config.parallel.data=1', '--config.evaluate.batch_size=5', *more),
  ])  # fmt: skip
  return json.loads(output.read_text())


def assert_at_0(npz, weights, folder):
  """Scores a set against itself, copied to `folder`/data.npz."""
  shutil.copy(npz, folder / 'data.npz')
  found = scores_of(npz, folder / 'data.npz', weights, folder)
  assert found['samples'] == 5
  size = np.load(folder / 'data_all_5_24x32.npz')['sigma'].trace()
  # A rounding of what they vary by.
  assert found['scores']['FID@5'] < 1e-6 * size
  assert found['scores']['precision'] == found['scores']['recall'] == 1
  return found


def test_images_made_elsewhere_and_statistics_that_do_not_fit(
  photographs, weights, tmp_path, capsys
):
  """No run is there. A set against itself is at 0, in either form."""
  npz, folder = photographs
  first = assert_at_0(npz, weights, tmp_path)
  data = tmp_path / 'data.npz'
  assert f'| {npz} |' in capsys.readouterr().out
  second = scores_of(folder, data, weights, tmp_path)
  assert second['scores'] == first['scores']

  # The other way in, against statistics of the first.
  other = '--config.evaluate.resize=pytorch_fid'
  with pytest.raises(errors.UserError, match=r"resize \('tensorflow' there"):
    scores_of(npz, data, weights, tmp_path, other)
  named = tmp_path / 'data_all_5_24x32.npz'
  with pytest.raises(errors.UserError, match=r"resize \('tensorflow' there"):
    scores_of(npz, data, weights, tmp_path, other, f'--reference={named}')
  mu, sigma = (np.load(named)[name] for name in ('mu', 'sigma'))
  np.savez(tmp_path / 'common.npz', mu=mu, sigma=sigma)
  third = scores_of(
    npz, data, weights, tmp_path, f'--reference={tmp_path / "common.npz"}'
  )
  assert third['scores']['FID@5'] == first['scores']['FID@5']
  assert 'KID' not in third['scores']
  assert third['reference'].startswith('common.npz (sha256 ')

  pieces = np.load(data)['images']
  images.save_npz(data, pieces[:, ::-1])
  with pytest.raises(errors.UserError, match=r'pixels.*Delete the file'):
    scores_of(npz, data, weights, tmp_path)


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    ([], 'download https://github.com/mseitzer/pytorch-fid/releases'),
    (['--num_samples=1'], 'need 2 images'),
    (['--inception=none.pth'], 'none.pth is not a file'),
    (['--inception=README.md'], 'README.md cannot be read|torch'),
    (['--config.evaluate.resize=tf'], 'known: pytorch_fid, tensorflow'),
    (['--images=x'], 'set one of them'),
    (['--step=3'], 'no checkpoint 3'),
    (['--config.evaluate.weights=best'], "known: '', ema, raw"),
    (['--reference=none.npz'], 'none.npz is not a file'),
    (['--workdir=runs/none'], 'runs/none'),
  ],
)
def test_mistakes_are_one_line(args, message, tiny_run, weights):
  common = ['--mode=evaluate', f'--workdir={tiny_run[0]}', '--num_samples=8']
  if args and not args[0].startswith('--inception'):
    common += [f'--inception={weights}']
  with pytest.raises(errors.UserError, match=message) as caught:
    main.run([*common, *SHORT, *args])
  assert '\n' not in str(caught.value)


def test_flags_that_do_not_go_together_are_named(tiny_run, tmp_path):
  def mistake(*args):
    with pytest.raises(errors.UserError) as caught:
      main.run([f'--workdir={tiny_run[0]}', *map(str, args)])
    return str(caught.value)

  assert '--step is for' in mistake('--mode=sample', '--step=3')
  assert '--num_samples' in mistake('--mode=evaluate', '--inception=x')
  evaluate = ['--mode=evaluate', '--images']
  assert 'does not exist' in mistake(*evaluate, tmp_path / 'none')
  assert 'holds no image' in mistake(*evaluate, tmp_path)
  assert 'checkpoint' in mistake(*evaluate, tmp_path, '--step=3')

  def array(x):
    images.save_npz(tmp_path / 'x.npz', x)
    return mistake(*evaluate, tmp_path / 'x.npz')

  assert 'uint8' in array(np.zeros((4, 8, 8, 3), np.float32))
  assert '4 channels' in array(np.zeros((4, 8, 8, 4), np.uint8))
  assert '9x8, those of the recipe 8x8' in array(
    np.zeros((4, 9, 8, 1), np.uint8)
  )
  assert 'download https' in array(np.zeros((4, 8, 8, 1), np.uint8))


def test_images_of_two_sizes_and_broken_ones_are_named(tmp_path):
  """At once, not where their turn would come."""
  for i, side in enumerate((8, 8, 9)):
    images.save_png(tmp_path / f'{i}.png', np.zeros((side, side, 3), np.uint8))
  args = ['--mode=evaluate', '--config=configs/digits.py']
  args.append(f'--images={tmp_path}')
  with pytest.raises(errors.UserError, match=r'2.png is 9x9, and 0.png is 8x8'):
    main.run(args)
  (tmp_path / '2.png').write_bytes(b'broken')
  with pytest.raises(errors.UserError, match=r'2.png cannot be read'):
    main.run(args)


def test_features_are_those_of_inception():
  """Of gray images too, and not of the network that is in its place here."""
  images = jax.ShapeDtypeStruct((2, 8, 8, 1), np.uint8)
  config = recipe.shipped('digits')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(inception, 'Inception', REAL)
    found = jax.eval_shape(
      features.features(config), inception.parameters(), images
    )
  assert [x.shape for x in found] == [(2, 2048), (2, 2023), (2, 1008)]


@pytest.mark.slow
def test_a_set_scored_by_inception_itself_is_at_0_from_itself(
  photographs, tmp_path, monkeypatch
):
  monkeypatch.setattr(inception, 'Inception', REAL)
  path = tmp_path / 'inception.safetensors'
  safetensors.numpy.save_file(drawn(), path)
  assert_at_0(photographs[0], path, tmp_path)


@pytest.mark.slow
def test_two_processes_share_the_work(
  undisturbed, tiny_run, weights, start, tmp_path
):
  workdir = tmp_path / 'runs' / 'shared'
  shutil.copytree(tiny_run[0], workdir)
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    where = f'--coordinator=127.0.0.1:{free.getsockname()[1]}'
  args = command(workdir, weights, '--num_samples=7')
  processes = [
    start(*args, where, '--num_processes=2', f'--process_id={i}') for i in '01'
  ]
  outs = [process.communicate(timeout=300) for process in processes]
  for process, (out, err) in zip(processes, outs, strict=True):
    assert process.returncode == 0, out + err
  assert 'FID@7' in outs[0][0]
  assert 'FID' not in outs[1][0]  # one speaks for both
  (one,), (two,) = entries(undisturbed[0]), entries(workdir)
  # The sums of the reference are added up in another order.
  scores = one.pop('scores'), two.pop('scores')
  assert one == two
  assert scores[1] == pytest.approx(scores[0], rel=1e-6)
