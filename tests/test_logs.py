"""What a run says of itself: bars, lines, and the log."""

import io
import json
import re
import sys
import time

import numpy as np
import pytest
import tqdm

from ddpm_jax.parallel import engines
from ddpm_jax.parallel import meshes
from ddpm_jax.storage import boards
from ddpm_jax.storage import logs
from ddpm_jax.storage import metrics_log


class Clock:
  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(time, 'time', clock)
  monkeypatch.setattr(tqdm.std, 'time', clock)
  return clock


def train(clock, total, initial, *, compiles, step):
  """A loop whose first step compiles; gives the bar after each step."""

  def run(step_takes):
    clock.now += step_takes

  def first(step_takes):
    clock.now += compiles * (not seen)
    run(step_takes)
    seen.append(1)

  seen = []
  call = logs.compiling('the train step', first)
  with logs.Progress('training', total, 'steps', initial=initial) as bar:
    for _ in range(initial, total):
      call(step)
      logs.advance(bar, 0.5, 64)
      yield bar


@pytest.mark.parametrize('initial', [0, 60])
def test_rate_and_time_left_are_of_steps_after_the_first(
  clock, capsys, initial
):
  n = initial
  for bar in train(clock, 100, initial, compiles=127, step=2):
    n += 1
    assert bar.seconds == pytest.approx(2 * (n - initial - 1))
    # Not known after the first step, and then half a step a second.
    assert bar.rate == (None if n == initial + 1 else pytest.approx(0.5))
  compiling, compiled, *bars = capsys.readouterr().err.splitlines()
  assert compiling == 'compiling the train step'
  assert compiled == 'compiled the train step in 129.0 s'
  assert bars[0] == (
    f'training:  {initial + 1:2}% {initial + 1}/100 steps [00:00 < ?, '
    'loss=0.5000]'
  )
  left = 2 * (100 - initial - 6)
  assert bars[1] == (
    f'training:  {initial + 6:2}% {initial + 6}/100 steps [00:10 < '
    f'{left // 60:02}:{left % 60:02}, loss=0.5000, images/s=32]'
  )
  assert '100/100 steps' in bars[-1]


def test_a_file_gets_whole_lines_every_ten_seconds_and_at_the_end(
  clock, monkeypatch
):
  file = io.StringIO()
  monkeypatch.setattr(sys, 'stderr', file)
  for i, _ in enumerate(train(clock, 1000, 0, compiles=30, step=0.1)):
    if i == 500:
      logs.say('a word in between')
  text = file.getvalue()
  assert not set(text) - {'\n'} & set('\r\x1b')
  assert text.endswith('\n')
  lines = text.splitlines()
  assert lines.count('a word in between') == 1
  bars = [line for line in lines if line.startswith('training: ')]
  assert len(lines) == len(bars) + 3
  assert 10 <= len(bars) <= 12  # of a hundred seconds
  assert len(set(bars)) == len(bars)
  assert '1000/1000 steps' in bars[-1]


def test_a_terminal_has_a_bar_that_moves(clock, monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  file = Terminal()
  monkeypatch.setattr(sys, 'stderr', file)
  list(train(clock, 1000, 0, compiles=30, step=0.1))
  assert file.getvalue().count('\r') > 100


def test_time_for_pictures_is_not_time_of_training(clock, capsys):
  for i, bar in enumerate(train(clock, 20, 0, compiles=9, step=2)):
    if i == 4:
      with bar.paused():
        clock.now += 300
    assert bar.seconds == pytest.approx(2 * i)
  assert '[00:38 < 00:00' in capsys.readouterr().err


def test_batches_are_counted_and_one_alone_is_a_line(clock, capsys):
  for n in (3, 10):
    batches = [np.zeros((min(4, n - i), 2)) for i in range(0, n, 4)]

    def slowly(batches=batches):
      for batch in batches:
        clock.now += 15
        yield batch

    assert len(list(logs.watched(slowly(), 'drawing', n))) == len(batches)
  assert capsys.readouterr().err.splitlines() == [
    'drawing: 3 images in 15.0 s',
    'drawing:  40% 4/10 images [00:00 < ?, batch=1 of 3]',
    'drawing:  80% 8/10 images [00:15 < 00:07, batch=2 of 3]',
    'drawing: 100% 10/10 images [00:30 < 00:00, batch=3 of 3]',
  ]


@pytest.mark.parametrize('make', engines.ENGINES.values())
def test_what_compiles_says_so_once(make, capsys):
  engine = make(meshes.make_mesh(1))
  double = engine.compile_map(lambda params, x: 2 * x, {}, name='the double')
  x = np.arange(4.0, dtype=np.float32)
  for _ in range(2):
    out = double({}, engine.put_whole(x))
    np.testing.assert_array_equal(out, 2 * x)
  compiling, compiled = capsys.readouterr().err.splitlines()
  assert compiling == 'compiling the double'
  assert re.fullmatch(r'compiled the double in \d+\.\d s', compiled)


def write(folder, start, steps, **values):
  with metrics_log.opened(folder, boards.Board(), start, 64) as log:
    for step, seconds in steps:
      log.write(step, {'loss': 1 / step} | values, seconds)


def test_a_line_has_seconds_of_training_and_images_a_second(tmp_path):
  write(tmp_path, 0, [(10, 4.5), (20, 9.5)], learning_rate=0.1)
  # Killed at step 27, and begun again from the checkpoint of step 20.
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 25, "loss": 1.0, "seconds": 12.0}\n{"step": 26, "lo')
  write(tmp_path, 20, [(21, 1e-5), (30, 4.5)], learning_rate=0.1)
  lines = metrics_log.read(tmp_path / 'metrics.jsonl')
  assert [line['step'] for line in lines] == [10, 20, 21, 30]
  assert [line['seconds'] for line in lines] == [4.5, 9.5, 9.5, 14.0]
  rates = [line.get('images_per_second') for line in lines]
  assert rates == [128.0, 128.0, None, 128.0]  # half a second a step
  steps, loss = metrics_log.curve(tmp_path, 'loss')
  np.testing.assert_array_equal(loss, 1 / steps)


def test_a_log_of_before_is_read_and_gone_on_with(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 10, "loss": 0.5, "grad_norm": 1.0}\n')
  write(tmp_path, 10, [(20, 4.5)])
  assert json.loads(path.read_text().splitlines()[0])['loss'] == 0.5
  steps, _ = metrics_log.curve(tmp_path, 'loss')
  assert steps.tolist() == [10, 20]
  steps, seconds = metrics_log.curve(tmp_path, 'seconds')
  assert (steps.tolist(), seconds.tolist()) == ([20], [4.5])
