"""The files of launch/: what they would do, and that it is well-formed."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml
from kubeflow_trainer_api import models

from ddpm_jax import flags as command

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / 'launch').glob('*.sh'))
NEEDS = {
  'jobset.sh': {
    'NAME': 'ddpm',
    'IMAGE': 'registry.example/ddpm_jax',
    'CLAIM': 'runs',
    'WORKDIR': 'cifar',
    'HOSTS': '4',
    'CHIPS': '4',
    'ACCELERATOR': 'tpu-v5-lite-podslice',
    'TOPOLOGY': '4x4',
  },
  'slurm.sh': {'WORKDIR': '/shared/cifar', 'NODES': '2', 'GPUS': '8'},
  'tpu_vm.sh': {
    'NAME': 'ddpm',
    'ZONE': 'us-central2-b',
    'TYPE': 'v4-32',
    'VERSION': 'tpu-ubuntu2204-base',
    'WORKDIR': '/mnt/cifar',
  },
}
ARGS = ['--config=configs/cifar.py', '--config.model.multipliers=(1, 2, 2, 2)']
BIN = pathlib.Path(sys.executable).parent  # where pip puts programs


def call(*command, **more):
  env = {'PATH': f'{BIN}:{os.environ["PATH"]}', 'HOME': '/'} | more
  return subprocess.run(
    list(map(str, command)), env=env, cwd=ROOT, capture_output=True, text=True
  )


def dry_run(script, **more):
  env = NEEDS[script] | more
  done = call('bash', f'launch/{script}', '--dry-run', *ARGS, **env)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_every_script_is_known_here():
  # test_machine runs cpu.sh.
  assert [path.name for path in SCRIPTS] == sorted(['cpu.sh', *NEEDS])


@pytest.mark.parametrize(
  'linter',
  [['shellcheck'], ['shfmt', '-d', '-i', '2', '-ci']],
  ids=lambda x: x[0],
)
def test_scripts_pass(linter):
  done = call(*linter, *SCRIPTS, '.ci/run')
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('script', NEEDS)
def test_a_missing_variable_is_named_in_one_line(script):
  """The last one that it needs; all of them are asked for alike."""
  text = (ROOT / 'launch' / script).read_text()
  asked = re.findall(r'^ *: "\$\{(\w+):\?is not set: .+\}"$', text, re.M)
  assert sorted(asked) == sorted(NEEDS[script])
  env = {k: v for k, v in NEEDS[script].items() if k != asked[-1]}
  done = call('bash', f'launch/{script}', *ARGS, **env)
  assert done.returncode
  assert done.stdout == ''
  (line,) = done.stderr.splitlines()
  assert f'{asked[-1]}: is not set' in line


def started(script, text):
  """The words of the line that all end in, as the shell there will see them."""
  if script == 'jobset.sh':
    spec = yaml.safe_load(text)['spec']['replicatedJobs'][0]['template']['spec']
    (container,) = spec['template']['spec']['containers']
    return container['command'] + container['args']
  if script == 'tpu_vm.sh':
    (ssh,) = (x for x in text.splitlines() if 'ddpm_jax.main' in x)
    # `printf %q` writes $'...' around what has line ends.
    ssh = call('bash', '-c', f'printf "%s\\0" {ssh}').stdout.split('\0')
    text = ssh[-2].removeprefix('--command=').replace(' &\n', '\n')
  (line,) = (x for x in text.splitlines() if 'ddpm_jax.main' in x)
  return shlex.split(line)


@pytest.mark.parametrize('script', NEEDS)
def test_all_end_in_the_same_line(script):
  words = started(script, dry_run(script))
  at = words.index('-m')
  assert words[at - 1].endswith('python')
  assert words[at + 1] == 'ddpm_jax.main'
  assert words[at + 2].startswith('--workdir=/')
  assert words[at + 2].endswith('/cifar')
  assert words[at + 3 :] == ['--stopped_code=75', *ARGS]
  flags, changes = command.split(words[at + 2 :])
  command.parse(flags)
  assert list(changes) == ['model.multipliers']


@pytest.mark.parametrize('script', NEEDS)
def test_a_run_in_a_bucket_needs_no_disk(script):
  words = started(
    script, dry_run(script, WORKDIR='gs://bucket/cifar', CLAIM='')
  )
  assert '--workdir=gs://bucket/cifar' in words


def test_Slurm_makes_no_folder_that_is_called_gs(tmp_path):
  (tmp_path / 'sbatch').write_text('#!/bin/sh\necho "$@"\n')
  (tmp_path / 'sbatch').chmod(0o755)
  done = subprocess.run(
    ['bash', str(ROOT / 'launch' / 'slurm.sh'), *ARGS],
    env=NEEDS['slurm.sh']
    | {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'WORKDIR': 'gs://bucket/a'},
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert '--output=./slurm-%j.log' in done.stdout
  assert [path.name for path in tmp_path.iterdir()] == ['sbatch']


def test_the_local_launcher_says_what_it_would_start():
  local = [sys.executable, 'launch/local.py', '--dry-run']
  done = call(*local, '--processes=3', '--workdir=/cifar', *ARGS)
  lines = [shlex.split(line) for line in done.stdout.splitlines()]
  assert len(lines) == 3
  for i, words in enumerate(lines):
    assert words[1:5] == ['-m', 'ddpm_jax.main', '--workdir=/cifar', ARGS[0]]
    assert words[-1] == f'--process_id={i}'
    flags, _ = command.split(words[3:])
    assert command.parse(flags).num_processes == 3
  done = call(*local, *ARGS)
  assert done.returncode == 2
  assert 'name the --workdir' in done.stderr


@pytest.mark.parametrize('spot', ['', 'yes'])
def test_the_YAML_is_a_JobSet(spot, tmp_path):
  text = dry_run('jobset.sh', SPOT=spot)
  path = tmp_path / 'jobset.yaml'
  path.write_text(text)
  done = call('yamllint', '--strict', '-d', '{extends: default}', path)
  assert done.returncode == 0, done.stdout
  written = yaml.safe_load(text)
  read = models.JobsetV1alpha2JobSet.from_dict(written).to_dict()
  assert_within(written, read)  # what the schema does not know is dropped
  template = written['spec']['replicatedJobs'][0]['template']
  selector = template['spec']['template']['spec']['nodeSelector']
  assert ('cloud.google.com/gke-spot' in selector) == bool(spot)


def assert_within(part, whole, at='') -> None:
  if isinstance(part, dict):
    for key in part:
      assert key in whole, f'{at}: unknown field {key}'
      assert_within(part[key], whole[key], f'{at}/{key}')
  elif isinstance(part, list):
    assert len(part) == len(whole), at
    for i, pair in enumerate(zip(part, whole, strict=True)):
      assert_within(*pair, f'{at}/{i}')
  else:
    assert part == whole, at


def test_the_schema_knows_a_wrong_field_from_a_right_one():
  wrong = yaml.safe_load(dry_run('jobset.sh'))
  wrong['spec']['replicatedJobs'][0]['template']['spec']['backofLimit'] = 1
  read = models.JobsetV1alpha2JobSet.from_dict(wrong).to_dict()
  with pytest.raises(AssertionError, match='unknown field backofLimit'):
    assert_within(wrong, read)


@pytest.mark.parametrize(
  ('code', 'restarts', 'again'),
  [
    (0, 0, False),
    (2, 0, False),
    (75, 0, True),
    (1, 19, True),
    (137, 20, False),
  ],
)
def test_a_job_is_queued_again_unless_it_is_done_or_mistaken(
  code, restarts, again, tmp_path
):
  """What is in Slurm's place here notes what it is told."""
  for name, exits in {'srun': code, 'scontrol': 0}.items():
    program = tmp_path / name
    program.write_text(f'#!/bin/sh\necho {name} "$@"\nexit {exits}\n')
    program.chmod(0o755)
  done = call(
    *('bash', 'launch/slurm.sh', *ARGS),
    PATH=f'{tmp_path}:{os.environ["PATH"]}',
    SLURM_JOB_ID='7',
    SLURM_RESTART_COUNT=str(restarts),
    **{'WORKDIR': '/shared/cifar', 'RESTARTS': '20', 'PYTHON': 'python'},
  )
  first, *rest = done.stdout.splitlines()
  assert first.startswith(
    'srun python -m ddpm_jax.main --workdir=/shared/cifar'
  )
  assert rest == (['scontrol requeue 7'] if again else [])
  assert done.returncode == (0 if again else code)


def test_a_mistake_is_not_tried_again_and_a_crash_so_often(tmp_path):
  """With a stand-in for the program, which takes no time to start."""
  package = tmp_path / 'ddpm_jax'
  package.mkdir()
  (package / '__init__.py').write_text('')
  program = package / 'main.py'

  def launch(body, *flags):
    program.write_text(f'import os, sys, time\n{body}')
    local = [sys.executable, ROOT / 'launch/local.py', '--processes=2']
    return subprocess.run(
      [*map(str, local), '--workdir=w', '--backoff=0', *flags],
      cwd=tmp_path,
      capture_output=True,
      text=True,
      timeout=60,
    )

  done = launch('sys.exit(2)')
  assert (done.returncode, done.stderr) == (2, '')
  done = launch('sys.exit(1)', '--restarts=3')
  assert done.returncode == 1
  *tries, last = done.stderr.splitlines()
  assert len(tries) == 3
  assert all('process 0 exited with 1' in line for line in tries)
  assert last.endswith('gave up after 3 restarts')
  # Stopped or killed at first, done at the second try.
  once = (
    'if "tried" not in os.listdir("."):\n'
    '  time.sleep(0.5)\n  open("tried", "w")\n  time.sleep(0.5)\n'
  )
  for end, told in {
    'sys.exit(75)': 'process 0 stopped, process 1 stopped; restart 1 of 20',
    'os.kill(os.getpid(), 9)': 'process 0 ended by SIGKILL',
  }.items():
    (tmp_path / 'tried').unlink(missing_ok=True)
    done = launch(f'{once}  {end}\n')
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert told in line


# In the place of the program: it ends well when it is asked to, once.
ASKED = """
import os, pathlib, signal, sys, time
me = sys.argv[-1].rpartition('=')[2]
asked = []
for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
  if signal.getsignal(s) != signal.SIG_IGN:
    signal.signal(s, lambda number, frame: asked.append(number))
pathlib.Path(f'{me}.part').write_text(str(os.getpid()))
os.replace(f'{me}.part', f'{me}.pid')
while not asked:
  time.sleep(0.01)
pathlib.Path(f'{me}.asked').write_text(str(int(asked[0])))
sys.exit(75)
"""


@pytest.fixture
def launcher(tmp_path):
  """Starts two stand-ins by launch/local.py: (launcher, their pids)."""
  package = tmp_path / 'ddpm_jax'
  package.mkdir()
  (package / '__init__.py').write_text('')
  (package / 'main.py').write_text(ASKED)
  started, pids = [], []

  def launcher(*before, **options):
    local = [sys.executable, str(ROOT / 'launch/local.py'), '--workdir=w']
    process = subprocess.Popen([*before, *local], cwd=tmp_path, **options)
    started.append(process)
    wait_until(lambda: len(list(tmp_path.glob('*.pid'))) == 2)
    pids.extend(int((tmp_path / f'{i}.pid').read_text()) for i in range(2))
    return process, pids

  yield launcher
  for process in started:
    process.kill()
    process.wait()
  for pid in pids:
    if alive(pid):
      os.kill(pid, signal.SIGKILL)


def alive(pid):
  """Whether it runs: one that ended may be a zombie that nobody waits for."""
  try:
    text = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    return False
  return text.rpartition(')')[2].split()[0] != 'Z'


def wait_until(condition, seconds=30):
  late = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < late
    time.sleep(0.01)


@pytest.mark.parametrize(
  ('sent', 'heard', 'code'),
  [
    ('SIGKILL', 'SIGTERM', -signal.SIGKILL),
    ('SIGTERM', 'SIGTERM', 0),
    ('SIGINT', 'SIGTERM', 0),
    ('SIGHUP', 'SIGHUP', 0),
    ('SIGUSR1', 'SIGUSR1', 0),
  ],
)
def test_no_process_outlives_its_launcher(
  launcher, tmp_path, sent, heard, code
):
  process, pids = launcher()
  process.send_signal(signal.Signals[sent])
  assert process.wait(timeout=30) == code
  wait_until(lambda: not any(map(alive, pids)))
  for i in range(2):
    asked = int((tmp_path / f'{i}.asked').read_text())
    assert asked == signal.Signals[heard]


def test_a_launcher_that_loses_its_terminal_stops_all(launcher):
  """Nor does it die of what it cannot say."""
  master, slave = os.openpty()
  options = dict.fromkeys(['stdin', 'stdout', 'stderr'], slave)
  process, pids = launcher('setsid', '--ctty', **options)
  os.close(slave)
  os.close(master)
  assert process.wait(timeout=30) == 0
  wait_until(lambda: not any(map(alive, pids)))


def test_under_nohup_a_launcher_goes_on(launcher):
  null = subprocess.DEVNULL
  process, pids = launcher('nohup', stdout=null, stderr=null)
  process.send_signal(signal.SIGHUP)
  for pid in pids:
    os.kill(pid, signal.SIGHUP)
  time.sleep(1)
  assert process.poll() is None
  assert all(map(alive, pids))
