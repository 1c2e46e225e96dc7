"""Checkpoints: what is saved comes back bit for bit, or is not used."""

import errno
import functools
import importlib
import logging
import os
import pathlib
import pwd
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax import errors
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage import fingerprint

ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
EIGHT = jax.make_mesh((8,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,))
P = jax.sharding.PartitionSpec


def _sharding(x, where):
  """Split over eight devices along the first axis that divides, or one."""
  if where == 'one':
    return ONE
  axes = [i for i, n in enumerate(x.shape) if n % 8 == 0][:1]
  spec = P(*[None] * axes[0], 'fsdp') if axes else P()
  return jax.sharding.NamedSharding(EIGHT, spec)


@functools.partial(jax.jit, static_argnums=1)
def _values(step, width):
  """(state, ema) with every dtype in use, different at every step."""
  key = jax.random.fold_in(jax.random.key(0), step)
  params = {
    'conv': {
      'bias': jax.random.normal(key, (width,), jnp.bfloat16),
      'kernel': jax.random.normal(key, (3, 3, 8, width)),
    },
    'mask': jax.random.bernoulli(key, shape=(5, 3)),
    'seed': jax.random.bits(key, (2,), jnp.uint32),
  }
  floats = params['conv']
  opt_state = optax.adam(1e-3).init(floats)
  opt_state = jax.tree.map(lambda x: x + step.astype(x.dtype), opt_state)
  state = {'step': step, 'params': params, 'opt_state': opt_state}
  return state, jax.tree.map(lambda x: x[::-1], floats)


def _make(step, where='one', width=64):
  put = lambda x: jax.device_put(x, _sharding(x, where))  # noqa: E731
  return jax.tree.map(put, _values(jnp.int32(step), width))


def _abstract(tree, where='one'):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=_sharding(x, where)
    ),
    tree,
  )


def _save(checkpointer, *steps):
  for step in steps:
    state, ema = _make(step)
    checkpoint.save(
      checkpointer,
      step,
      state=state,
      ema=ema,
      data={'next_index': step},
      config={'lr': 1e-3},
    )


def _saved(path, *steps, **options):
  checkpointer = checkpoint.open(path, **{'keep': 9, **options})
  _save(checkpointer, *steps)
  checkpoint.close(checkpointer)
  return path


def _restore(source):
  return checkpoint.restore(source, *_abstract(_make(0)))


@pytest.fixture(scope='module')
def once(tmp_path_factory):
  return _saved(tmp_path_factory.mktemp('saved') / 'two', 1, 2)


@pytest.fixture
def two(once, tmp_path):
  """A folder with the checkpoints of steps 1 and 2, which a test may spoil."""
  return shutil.copytree(once, tmp_path / 'two')


def _restore_ema(path, **options):
  return checkpoint.restore_item(path, 'ema', _abstract(_make(0)[1]), **options)


def _assert_same(got, want):
  """Equal in structure, types and every bit (nan and -0.0 too)."""
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  chex.assert_trees_all_equal_comparator(
    lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(),
    lambda a, b: f'{a} and {b} differ in a bit',
    *(got, want),
  )


def _array_file(folder):
  """The file with the array data."""
  files = (p for p in pathlib.Path(folder).rglob('*') if p.is_file())
  return max(files, key=lambda p: p.stat().st_size)


def _flip(file, at):
  data = bytearray(file.read_bytes())
  data[at] ^= 1 << at % 8
  file.write_bytes(data)


@pytest.mark.parametrize('there', ['one', 'eight'])
@pytest.mark.parametrize('here', ['one', 'eight'])
@pytest.mark.smoke
def test_a_checkpoint_comes_back_bit_for_bit_on_any_layout(
  tmp_path, there, here
):
  state, ema = _make(7, there)
  ema['conv'] = (
    ema.pop('kernel').at[0, 0, 0, :3].set(jnp.array([jnp.nan, -0.0, jnp.inf]))
  )
  data = {'next_index': 448}
  config = {
    'lr': 2e-4,
    'name': 'ünet',
    'none': None,
    'sizes': [1, 2],
    'on': True,
  }
  checkpointer = checkpoint.open(tmp_path)
  checkpoint.save(
    checkpointer, 7, state=state, ema=ema, data=data, config=config
  )
  checkpoint.close(checkpointer)
  abstract = _abstract((state, ema), here)
  got = checkpoint.restore(tmp_path, *abstract)
  _assert_same((got.state, got.ema), (state, ema))
  assert (got.step, got.data, got.config) == (7, data, config)
  chex.assert_trees_all_equal_comparator(
    lambda x, wanted: x.sharding.is_equivalent_to(wanted.sharding, x.ndim),
    lambda x, wanted: f'{x.sharding} is not {wanted.sharding}',
    *((got.state, got.ema), abstract),
  )


def test_what_is_donated_right_after_save_is_saved_as_it_was(tmp_path):
  checkpointer = checkpoint.open(tmp_path)
  state, ema = _make(1, 'eight')
  # Large enough to be still under way when the next step overwrites it.
  big = jnp.arange(2**22, dtype=jnp.float32)
  ema['big'] = jax.device_put(big, _sharding(big, 'eight'))
  want = jax.tree.map(np.array, (state, ema))
  spoil = jax.jit(
    lambda t: jax.tree.map(lambda x: x ^ True if x.dtype == bool else x + 1, t),
    donate_argnums=0,
  )
  checkpoint.save(checkpointer, 1, state=state, ema=ema, data={}, config={})
  for _ in range(5):
    state, ema = spoil((state, ema))
  jax.block_until_ready((state, ema))
  checkpoint.close(checkpointer)
  got = checkpoint.restore(tmp_path, *_abstract(want, 'eight'))
  _assert_same((got.state, got.ema), want)


def test_the_newest_k_and_every_nth_are_kept(tmp_path):
  _saved(tmp_path, 1, 2, 3, 4, 5, 6, 7, 8, keep=2, keep_every=3)
  assert checkpoint.steps(tmp_path) == [3, 6, 7, 8]


def test_saving_a_saved_step_again_does_nothing(tmp_path):
  checkpointer = checkpoint.open(tmp_path)
  _save(checkpointer, 3)
  state, ema = _make(4)
  checkpoint.save(checkpointer, 3, state=state, ema=ema, data={}, config={})
  checkpoint.close(checkpointer)
  _assert_same(_restore(tmp_path)[1:3], _make(3))


def test_a_leftover_of_an_interrupted_save_is_ignored_then_removed(tmp_path):
  _saved(tmp_path, 1)
  leftover = tmp_path / '2.orbax-checkpoint-tmp'
  (leftover / 'state').mkdir(parents=True)
  assert checkpoint.steps(tmp_path) == [1]
  assert _restore(tmp_path).step == 1
  assert leftover.exists()  # Reading removes nothing.
  _saved(tmp_path, 3)
  assert not leftover.exists()


KILLED = """
import jax, jax.numpy as jnp, sys
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage import fingerprint
checkpointer = checkpoint.open(sys.argv[1], keep=1)
for step in range(1, 100):
  x = {'x': jnp.full((1 << 23,), step, jnp.float32)}
  checkpoint.save(checkpointer, step, state=x, ema=x, data={}, config={})
"""


def test_a_run_killed_while_saving_leaves_the_checkpoint_before(tmp_path):
  run = subprocess.Popen(
    [sys.executable, '-c', KILLED, tmp_path],
    cwd=pathlib.Path(__file__).parents[1],
  )
  while not list(tmp_path.glob('[2-9].orbax-checkpoint-tmp')):
    assert run.poll() is None
    time.sleep(0.002)
  run.send_signal(signal.SIGKILL)
  run.wait()
  assert list(tmp_path.glob('*-tmp'))  # It was in the midst of it.
  x = {'x': jax.ShapeDtypeStruct((1 << 23,), jnp.float32, sharding=ONE)}
  checkpointer = checkpoint.open(tmp_path, keep=1)
  got = checkpoint.restore(checkpointer, x, x)
  np.testing.assert_array_equal(got.state['x'], np.float32(got.step))
  checkpoint.close(checkpointer)
  assert not list(tmp_path.glob('*-tmp'))


DAMAGES = {
  'data removed': lambda folder: _array_file(folder).unlink(),
  'data truncated': lambda folder: os.truncate(_array_file(folder), 500),
  'data emptied': lambda folder: os.truncate(_array_file(folder), 0),
  'manifest removed': lambda folder: (folder / 'ema/manifest.ocdbt').unlink(),
  'manifest flipped': lambda folder: _flip(folder / 'ema/manifest.ocdbt', 40),
  'about removed': lambda folder: (folder / 'about/data.json').unlink(),
  'about changed': lambda folder: _flip(folder / 'about/data.json', 26),
}


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.smoke
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
  two, damage, caplog, capfd
):
  DAMAGES[damage](two / '2')
  got = _restore(two)
  assert got.step == 1
  _assert_same((got.state, got.ema), _make(1))
  [record] = caplog.records
  assert record.levelno == logging.WARNING
  assert f'{two}/2 is damaged' in record.message
  assert '\n' not in record.message
  assert capfd.readouterr().err == ''
  assert checkpoint.steps(two) == [1, 2]  # Reading removes nothing.


def test_a_flipped_bit_anywhere_in_the_arrays_is_noticed_or_harmless(two):
  want = {1: _make(1), 2: _make(2)}
  file = _array_file(two / '2/state')
  whole = file.read_bytes()
  draw = random.Random(0)
  noticed = 0
  for _ in range(20):
    _flip(file, draw.randrange(len(whole)))
    got = _restore(two)
    # Some bytes are padding or a copy: then all is as it was.
    _assert_same((got.state, got.ema), want[got.step])
    noticed += got.step == 1
    file.write_bytes(whole)
  assert noticed > 15
  assert _restore(two).step == 2


@pytest.mark.parametrize('dtype', ['bool', 'int8', 'bfloat16', 'uint32', 'f8'])
def test_any_changed_element_changes_the_fingerprint_on_any_layout(dtype):
  draw = np.random.default_rng(0)
  dtype = jnp.float8_e4m3fn if dtype == 'f8' else jnp.dtype(dtype)
  x = draw.integers(0, 2, (8, 3)).astype(dtype)
  want = fingerprint.of_array(jnp.asarray(x))
  assert fingerprint.of_host(jnp.asarray(x)) == want
  sharded = jax.device_put(x, _sharding(x, 'eight'))
  assert fingerprint.of_array(sharded) == want
  for i in range(x.size):
    changed = x.copy()
    changed.flat[i] = 1 - changed.flat[i]
    assert fingerprint.of_array(jnp.asarray(changed)) != want


def test_a_resumed_run_sets_the_damaged_step_aside_and_saves_it_again(tmp_path):
  _saved(tmp_path, 1, 2, 3)
  for step in 2, 3:
    DAMAGES['data removed'](tmp_path / str(step))
  checkpointer = checkpoint.open(tmp_path, keep=2)
  assert _restore(checkpointer).step == 1
  assert checkpoint.steps(tmp_path) == [1]
  assert len(list(tmp_path.glob('[23].damaged-*'))) == 2
  _save(checkpointer, 2, 3)
  checkpoint.close(checkpointer)
  assert checkpoint.steps(tmp_path) == [2, 3]
  _assert_same(_restore(tmp_path)[1:3], _make(3))


def test_with_all_damaged_the_user_is_told_and_nothing_is_renamed(two):
  for step in 1, 2:
    for item in 'state', 'ema':
      _array_file(two / str(step) / item).unlink()
  checkpointer = checkpoint.open(two)
  with pytest.raises(errors.UserError, match=r'no intact .* damaged: 1, 2'):
    _restore(checkpointer)
  with pytest.raises(errors.UserError, match=r'no intact .* damaged: 1, 2'):
    _restore_ema(two)
  checkpoint.close(checkpointer)
  assert checkpoint.steps(two) == [1, 2]


def test_ema_is_loaded_alone_from_the_newest_or_a_named_step(two):
  _array_file(two / '2/state').unlink()  # The EMA does not need it.
  step, ema = _restore_ema(two)
  assert step == 2
  _assert_same(ema, _make(2)[1])
  step, ema = _restore_ema(two, step=1)
  assert step == 1
  _assert_same(ema, _make(1)[1])


def test_ema_of_a_damaged_checkpoint_falls_back_unless_it_was_named(two):
  _array_file(two / '2/ema').unlink()
  assert _restore_ema(two)[0] == 1
  with pytest.raises(errors.UserError, match='damaged: 2'):
    _restore_ema(two, step=2)
  assert checkpoint.steps(two) == [1, 2]


def test_another_model_is_told_by_its_first_different_parameter(two):
  other = _abstract(_make(0, width=16))
  says = r'ema/bias is bfloat16\[64\] there, bfloat16\[16\] here$'
  with pytest.raises(errors.UserError, match=says):
    checkpoint.restore(two, *other)
  with pytest.raises(errors.UserError, match=says):
    checkpoint.restore_item(two, 'ema', other[1])


def test_another_dtype_or_tree_is_not_loaded_in_silence(two):
  ema = _abstract(_make(0)[1])
  wide = {**ema, 'bias': jax.ShapeDtypeStruct((64,), jnp.float32, sharding=ONE)}
  more = {**ema, 'scale': ema['bias']}
  less = {'bias': ema['bias']}
  for tree, says in [
    (wide, r'ema/bias is bfloat16\[64\] there, float32\[64\] here'),
    (more, r'ema/scale is absent there, bfloat16\[64\] here'),
    (less, r'ema/kernel is float32\[3, 3, 8, 64\] there, absent here'),
  ]:
    with pytest.raises(errors.UserError, match=says):
      checkpoint.restore_item(two, 'ema', tree)


def test_no_checkpoint_yet_is_none_to_a_run_and_an_error_to_a_sampler(
  two, tmp_path
):
  (tmp_path / 'empty').mkdir()
  for path in tmp_path / 'empty', tmp_path / 'absent':
    assert checkpoint.steps(path) == []
    assert _restore(path) is None
    with pytest.raises(errors.UserError, match='no checkpoint in'):
      _restore_ema(path)
  assert not (tmp_path / 'absent').exists()
  checkpointer = checkpoint.open(tmp_path / 'absent')
  assert _restore(checkpointer) is None
  checkpoint.close(checkpointer)
  with pytest.raises(errors.UserError, match=r'no checkpoint 3 in .* 1, 2'):
    _restore_ema(two, step=3)


def test_a_file_in_place_of_the_folder_is_an_error_in_one_line(tmp_path):
  file = tmp_path / 'file'
  file.write_text('')
  for call in checkpoint.steps, checkpoint.open, _restore, _restore_ema:
    with pytest.raises(errors.UserError, match='is a file') as caught:
      call(file)
    assert '\n' not in str(caught.value)
  with pytest.raises(errors.UserError, match='cannot save'):
    checkpoint.open(file / 'below')
  with pytest.raises(errors.UserError, match='keep = 0'):
    checkpoint.open(tmp_path, keep=0)


def test_a_full_disk_is_told_and_saving_goes_on_once_there_is_room(
  tmp_path, capfd
):
  checkpointer = checkpoint.open(tmp_path, keep=1)
  _save(checkpointer, 1)
  checkpoint.wait(checkpointer)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # As good as full.
  try:
    with pytest.raises(errors.UserError, match=r'cannot save .* too large'):
      _save(checkpointer, 2, 3)  # 3 finds that 2 has failed.
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert capfd.readouterr().err == ''
  assert _restore(tmp_path).step == 1
  _save(checkpointer, 2)
  checkpoint.close(checkpointer)
  assert checkpoint.steps(tmp_path) == [2]


def test_a_folder_that_went_away_is_told_at_once(tmp_path):
  checkpointer = checkpoint.open(tmp_path / 'c')
  (tmp_path / 'c').rmdir()
  (tmp_path / 'c').write_text('')
  with pytest.raises(errors.UserError, match='cannot save'):
    _save(checkpointer, 1)
  checkpoint.close(checkpointer)


def test_orbax_is_silent_even_where_others_log(tmp_path, caplog, capfd):
  caplog.set_level(logging.INFO)
  _saved(tmp_path, 1, 2)
  assert _restore(tmp_path).step == 2
  logging.getLogger('absl').info('from elsewhere')
  assert [r.message for r in caplog.records] == ['from elsewhere']
  assert capfd.readouterr().err == ''


def test_saves_leave_no_threads_and_no_open_files(tmp_path):
  """At 1,024 open files a run would die after 330 saves of 3 each."""

  def saves(n, path):
    checkpointer = checkpoint.open(path)
    tree = {'a': jnp.ones(3)}
    for step in range(n):
      checkpoint.save(
        checkpointer, step, state=tree, ema=tree, data=0, config={}
      )
    checkpoint.close(checkpointer)
    files = len(os.listdir('/proc/self/fd'))
    return np.array([threading.active_count(), files])

  once = saves(1, tmp_path / 'once')
  often = saves(8, tmp_path / 'often')
  assert np.all(often <= once + 2)  # 8 and 24 more, before


@pytest.fixture
def of_another_user():
  """A folder of a user that file permissions hold for, which we become."""
  # Others may not enter the folders of pytest.
  with tempfile.TemporaryDirectory() as folder:
    if os.geteuid():
      yield pathlib.Path(folder)
      return
    nobody = pwd.getpwnam('nobody').pw_uid
    os.chown(folder, nobody, -1)
    # What Orbax imports late may be where the other may not read.
    importlib.import_module('grp')
    os.seteuid(nobody)
    try:
      yield pathlib.Path(folder)
    finally:
      os.seteuid(0)


def test_what_cannot_be_read_is_not_taken_for_damaged(
  of_another_user, caplog, capfd
):
  root = _saved(of_another_user / 'run', 1, 2)
  parts = ('2', '2/state', '2/state/manifest.ocdbt', '2/ema/_METADATA')
  parts += ('2/ema/array_metadatas/process_0', '2/about', '2/about/data.json')
  paths = [root, _array_file(root / '2/state'), *(root / x for x in parts)]
  assert _restore(root).step == 2  # as this user
  for path in paths:
    before = path.stat().st_mode
    path.chmod(0)
    try:
      with pytest.raises(errors.UserError, match='cannot read') as error:
        _restore(root)
      assert '\n' not in str(error.value)
      if path in paths[2:4]:  # a run that goes on reads it alike
        checkpointer = checkpoint.open(root, keep=2)
        with pytest.raises(errors.UserError, match='cannot read'):
          _restore(checkpointer)
        checkpointer.close()
    finally:
      path.chmod(before)
  assert not caplog.records
  assert 'never awaited' not in capfd.readouterr().err
  assert checkpoint.steps(root) == [1, 2]  # Nothing was renamed.
  assert _restore(root).step == 2


@pytest.mark.parametrize(
  'error',
  [
    OSError(errno.EIO, 'Input/output error'),
    OSError(errno.ESTALE, 'Stale file handle'),
    OSError(errno.EMFILE, 'Too many open files'),
    TimeoutError(errno.ETIMEDOUT, 'Connection timed out'),
    ValueError('UNAVAILABLE: Error reading "gs://bucket/x": CURL error'),
    ValueError('INTERNAL: Error reading local file [OS error code: 5]'),
    ValueError('UNKNOWN: Failed to open [OS error code: 116: ESTALE]'),
  ],
)
def test_storage_that_fails_says_nothing_of_the_content(
  error, two, monkeypatch
):
  def fail(*_):
    raise ValueError('could not load') from error

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp, 'load_checkpointables', fail)
    checkpointer = checkpoint.open(two)
    with pytest.raises(errors.UserError, match='cannot read'):
      _restore(checkpointer)
    checkpointer.close()
  assert _restore(two).step == 2


def test_an_older_checkpoint_under_a_newer_name_is_noticed(two, caplog):
  shutil.copytree(two / '1', two / '3')
  assert _restore(two).step == 2
  assert 'it is of step 1, under another name' in caplog.text


def test_the_recipe_is_read_from_the_newest_checkpoint_that_has_one(two):
  assert checkpoint.newest_config(two / 'none') is None
  DAMAGES['about changed'](two / '2')
  assert checkpoint.newest_config(two) == {'lr': 1e-3}
  DAMAGES['about removed'](two / '1')
  assert checkpoint.newest_config(two) is None


def test_a_recipe_that_cannot_be_read_is_not_taken_for_damaged(
  two, monkeypatch
):
  def fail(_):
    raise OSError(errno.EIO, 'Input/output error')

  monkeypatch.setattr(checkpoint, '_about', fail)
  with pytest.raises(errors.UserError, match='cannot read checkpoint'):
    checkpoint.newest_config(two)
