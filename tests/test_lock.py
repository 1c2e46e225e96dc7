"""One writer at a time in a workdir."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import pathlib
import signal
import threading

import pytest

from ddpm_jax import errors
from ddpm_jax.storage import lock
from ddpm_jax.storage import workdir


def _hold(folder, ready, beating):
  if beating:
    fcntl.lockf = _no_locks
    lock.BEAT = 0.2
  with lock.held(pathlib.Path(folder)):
    ready.set()
    signal.pause()


def _no_locks(*_):
  raise OSError(errno.ENOLCK, 'No locks available')


@contextlib.contextmanager
def another(folder, *, beating=False):
  """A process that writes into the folder: until it is killed."""
  spawn = multiprocessing.get_context('spawn')
  ready = spawn.Event()
  process = spawn.Process(target=_hold, args=(str(folder), ready, beating))
  process.start()
  assert ready.wait(60)
  try:
    yield process
  finally:
    process.kill()
    process.join()


def test_a_second_writer_is_refused_and_told_of_the_first(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(lock, 'WAIT', 0.5)
  with another(tmp_path) as process:
    with (
      pytest.raises(errors.UserError, match='another program') as error,
      lock.held(tmp_path),
    ):
      pass
    assert f'process {process.pid} on ' in str(error.value)
    assert '\n' not in str(error.value)
  with lock.held(tmp_path):  # It was killed, and left its file behind.
    assert (tmp_path / lock.NAME).exists()
  assert not any(tmp_path.iterdir())


def test_a_writer_that_is_about_to_end_is_waited_for(tmp_path, capfd):
  with another(tmp_path) as process:
    killer = threading.Timer(0.3, process.kill)
    killer.start()
    with lock.held(tmp_path):
      assert not process.is_alive()
    killer.join()
  assert capfd.readouterr().err.count('waiting up to 20 s') == 1


def test_without_locks_a_heartbeat_does(tmp_path, monkeypatch):
  monkeypatch.setattr(fcntl, 'lockf', _no_locks)
  monkeypatch.setattr(lock, 'BEAT', 0.2)
  monkeypatch.setattr(lock, 'GONE', 2.0)
  with another(tmp_path, beating=True) as process:
    with pytest.raises(errors.UserError, match='another program'):
      lock.held(tmp_path).__enter__()
    process.kill()
    process.join()
    assert (tmp_path / lock.NAME).exists()
    with lock.held(tmp_path):
      first = (tmp_path / lock.NAME).read_text()
      assert f'"process": {os.getpid()}' in first
  assert not any(tmp_path.iterdir())


def test_a_lock_that_its_last_holder_has_removed_is_not_taken(
  tmp_path, monkeypatch
):
  """Between opening the file and locking it, another may remove it."""
  real = fcntl.lockf
  opened = []

  def late(file, how):
    if not opened:
      os.unlink(tmp_path / lock.NAME)
    opened.append(os.fstat(file.fileno()).st_ino)
    return real(file, how)

  monkeypatch.setattr(fcntl, 'lockf', late)
  with lock.held(tmp_path):
    assert len(opened) == 2
    assert os.stat(tmp_path / lock.NAME).st_ino == opened[-1]


def test_a_folder_that_nothing_was_written_into_is_removed(tmp_path):
  with lock.held(tmp_path / 'a' / 'b'):
    assert (tmp_path / 'a' / 'b').is_dir()
  assert not any(tmp_path.iterdir())
  with lock.held(tmp_path / 'a' / 'b'):
    (tmp_path / 'a' / 'b' / 'config.json').touch()
  assert [x.name for x in (tmp_path / 'a' / 'b').iterdir()] == ['config.json']
  (tmp_path / 'mine').mkdir()
  with lock.held(tmp_path / 'mine'):
    pass
  assert (tmp_path / 'mine').is_dir()  # It was there before.


def test_default_workdirs_of_one_second_are_not_one_folder(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  folders = [workdir.default('digits') for _ in range(30)]
  assert len(set(folders)) == 30
  assert all(folder.is_dir() for folder in folders)


def test_a_lock_that_says_nothing_still_holds(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, 'WAIT', 0)
  with another(tmp_path):
    (tmp_path / lock.NAME).write_text('?')
    with (
      pytest.raises(errors.UserError, match='another program is writing'),
      lock.held(tmp_path),
    ):
      pass


def test_a_lock_that_cannot_be_tried_is_an_error(tmp_path, monkeypatch):
  def fail(*_):
    raise OSError(errno.EIO, 'Input/output error')

  monkeypatch.setattr(fcntl, 'lockf', fail)
  with pytest.raises(OSError, match='Input/output'), lock.held(tmp_path):
    pass


def test_of_two_heartbeats_that_begin_at_once_one_is_refused(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(fcntl, 'lockf', _no_locks)
  other = '{"host": "there", "process": 1, "since": "now", "token": "x"}'
  monkeypatch.setattr(
    lock.time, 'sleep', lambda _: (tmp_path / lock.NAME).write_text(other)
  )
  with (
    pytest.raises(errors.UserError, match='process 1 on there'),
    lock.held(tmp_path),
  ):
    pass
