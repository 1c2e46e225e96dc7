"""What all tests share: their devices, what they compile, one small run.

Most of the suite's time is compilation. So the compiler optimises less, and
what one worker or one run of the suite has compiled no other need compile; the
cache of whoever runs the suite is left alone.
"""

import contextlib
import fcntl
import gc
import importlib.metadata
import os
import pathlib
import signal
import subprocess
import sys

import jaxtyping
import pytest

ROOT = pathlib.Path(__file__).parents[1]
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
FLAGS = '--xla_backend_optimization_level=0'
# Each of these compiles in two thirds of the time. The compiler of jaxlib 0.12
# does not know the second, and refuses what it does not know.
FLAGS += ' --xla_cpu_parallel_codegen_split_count=1'
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  FLAGS += ' --xla_cpu_use_fusion_emitters=false'
os.environ['XLA_FLAGS'] = FLAGS
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(ROOT / '.pytest_cache' / 'xla')
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
# A broadcast that adds an axis, (B,) with (B, D), is written out.
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
# Every call is held to the shapes in the signature. The option that jaxtyping
# gives pytest cannot say that an int will do for a float, as in mypy.
jaxtyping.install_import_hook(
  [
    *('ddpm_jax.diffusion', 'ddpm_jax.models'),
    *('ddpm_jax.compression.codec', 'ddpm_jax.study.two_term'),
  ],
  'beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))',
)

import jax  # noqa: E402 - it reads these variables

DIGITS = f'{ROOT}/configs/digits.py:paper'
# A run whose network is two convolutions: all else is as a user has it.
TINY = [
  f'--config={DIGITS}',
  '--config.model.name=two_convolutions.network',
  '--config.data.flip=true',
  '--config.batch_size=16',
  '--config.optimizer.warmup=5',
  '--config.sampler.steps=10',
  '--config.log.every=1',
  '--config.checkpoint.every=40',
  '--num_samples=9',
]
UNET = [
  *(x for x in TINY if 'model.name' not in x),
  '--config.model.channels=8',
  '--config.model.multipliers=(1,)',
  '--config.model.groups=4',
  '--config.model.dropout=0.1',
]


def pytest_collection_modifyitems(items):
  """What takes long comes first, so that no worker is left with it at the end.

  A worker takes over tests from the end of what another has to do: so a module
  with much to share stays with one.
  """
  items.sort(key=lambda item: not item.get_closest_marker('eight_devices'))


@pytest.fixture(scope='module', autouse=True)
def devices(request):
  """One, or eight in a module that is marked so: tests of parallelism.

  A program for eight virtual devices takes longer to compile, and on two cores
  longer to run.
  """
  with pytest.MonkeyPatch.context() as patch:
    if not request.node.get_closest_marker('eight_devices'):
      one = jax.devices()[:1]
      for name in ('devices', 'local_devices'):
        patch.setattr(jax, name, lambda: one)
      for name in ('device_count', 'local_device_count'):
        patch.setattr(jax, name, lambda: 1)
    yield
  # What is left of a module (compiled functions, most of it) stays: garbage
  # need not be looked for there. Each look at all of it takes seconds, and
  # checkpoint.py asks for some.
  gc.collect()
  gc.freeze()


@pytest.fixture
def no_nans():
  """A NaN is an error where it arises: for tests of mathematics, at no cost.

  Looking for tracers that leak takes six times as long there: not done.
  """
  with jax.debug_nans(True):
    yield


@contextlib.contextmanager
def shared(tmp_path_factory, name):
  """A folder of all workers of this session, held by one of them at a time."""
  root = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    root = root.parent
  folder = root / name
  folder.mkdir(exist_ok=True)
  with (root / f'{name}.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield folder


@pytest.fixture(scope='session')
def user_env():
  """The environment of a user with one device, for programs of their own.

  The compiler does for them what it does for a user.
  """
  env = os.environ | {
    'JAX_NUM_CPU_DEVICES': '1',
    'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}',
  }
  del env['XLA_FLAGS']
  return env


@pytest.fixture
def stop_at(monkeypatch):
  """Stops runs in this process after a step, as a signal does."""

  def stop_at(step):
    asked = contextlib.nullcontext(lambda now: now >= step)
    monkeypatch.setattr('ddpm_jax.parallel.stop.requests', lambda: asked)

  return stop_at


@pytest.fixture(scope='session')
def env(user_env):
  """As `user_env`, with less optimisation, so that programs start sooner."""
  return user_env | {'XLA_FLAGS': os.environ['XLA_FLAGS']}


def contents(folder):
  return {
    path: (path.stat().st_size, path.stat().st_mtime_ns)
    for path in folder.rglob('*')
    if path.is_file()
  }


@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory, env):
  """A run of 200 steps that nothing happened to: (workdir, stderr).

  Nor does it, or a library that it uses, warn of anything. It is there for all
  tests to read; who writes into it copies it first.
  """
  with shared(tmp_path_factory, 'tiny') as folder:
    workdir, stderr = folder / 'run', folder / 'stderr'
    if not stderr.exists():
      process = subprocess.run(
        [
          *(sys.executable, '-m', 'ddpm_jax.main', *TINY),
          *('--config.steps=200', f'--workdir={workdir}'),
        ],
        env=env | {'PYTHONWARNINGS': 'error'},
        capture_output=True,
        text=True,
        check=True,
      )
      stderr.write_text(process.stderr)
  before = contents(workdir)
  yield workdir, stderr.read_text()
  assert contents(workdir) == before


def children(process):
  path = f'/proc/{process.pid}/task/{process.pid}/children'
  return [int(x) for x in pathlib.Path(path).read_text().split()]


@pytest.fixture
def popen():
  """Starts a program; kills it in the end."""
  started = []

  def popen(command, env):
    pipe = subprocess.PIPE
    process = subprocess.Popen(
      command,
      env=env,
      cwd=ROOT,
      stdin=pipe,
      stdout=pipe,
      stderr=pipe,
      text=True,
    )
    started.append(process)
    return process

  yield popen
  for process in started:
    if process.poll() is None:
      for child in children(process):  # of a launcher
        os.kill(child, signal.SIGKILL)
    process.kill()
    process.communicate()
