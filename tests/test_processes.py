"""Several real processes on one machine: the same numbers, and one end."""

import contextlib
import json
import os
import pathlib
import queue
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import chex
import conftest
import numpy as np
import pytest
import test_main
from PIL import Image

from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax.evaluation import record
from ddpm_jax.parallel import processes
from ddpm_jax.storage import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
# Smaller still than conftest's.
TINY = [
  *conftest.TINY,
  '--config.schedule.T=20',
  '--config.schedule.beta_T=0.5',
  '--config.sampler.steps=5',
  '--config.checkpoint.every=10',
]


def free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


@pytest.fixture
def start(popen, env):
  """Starts the program as n processes, or `only` some of them."""

  def start(n, *args, devices=1, only=None):
    command = [sys.executable, '-m', 'ddpm_jax.main', *map(str, args)]
    where = f'--coordinator=127.0.0.1:{free_port()}'
    return [
      popen(
        [*command, where, f'--num_processes={n}', f'--process_id={i}']
        if n > 1
        else command,
        env | {'JAX_NUM_CPU_DEVICES': str(devices)},
      )
      for i in only or range(n)
    ]

  return start


def ends(processes, timeout=900):
  """[(exit code, stdout, stderr)] of all, which must end in time."""
  late = time.monotonic() + timeout
  found = []
  for process in processes:
    out, err = process.communicate(timeout=max(late - time.monotonic(), 0.1))
    found.append((process.returncode, out, err))
  return found


@pytest.fixture
def run(start):
  """Runs it to its end: the stderr of process 0; the others say nothing."""

  def run(n, *args, **options):
    first, *others = ends(start(n, *args, **options))
    assert first[:2] == (0, ''), first
    assert others == [(0, '', '')] * (n - 1)
    return first[2]

  return run


def lines(workdir):
  path = workdir / 'metrics.jsonl'
  text = path.read_text() if path.exists() else ''
  return [
    json.loads(x) for x in text.splitlines(keepends=True) if x[-1] == '\n'
  ]


def wait_for_step(workdir, step, processes):
  late = time.monotonic() + 600
  while not any(line['step'] >= step for line in lines(workdir)):
    assert all(p.poll() is None for p in processes), ends(processes)
    assert time.monotonic() < late
    time.sleep(0.01)


def test_a_story_of_two_processes_and_one(start, tmp_path, capfd):
  """Stopped, killed, and gone on with alone: it is the run of one process."""
  one, story = tmp_path / 'one', tmp_path / 'story'
  # Many small steps: time to be stopped in, and little to compile.
  steps = [*TINY, '--config.steps=600', '--config.checkpoint.every=1000']
  args = [*steps, f'--workdir={story}']
  main.run([*steps, f'--workdir={one}'])

  pair = start(2, *args)
  wait_for_step(story, 5, pair)
  pair[1].send_signal(signal.SIGTERM)
  (code, out, err), (other, _, noise) = ends(pair, timeout=60)
  assert (code, out, other) == (0, '', 0), err
  assert re.fullmatch(r'(W.*SIGTERM caught.*\n)?', noise)  # JAX's word on it
  assert err.count(f'python -m ddpm_jax.main --workdir={story}') == 1
  (*_, stopped) = checkpoint.steps(story / 'checkpoints')
  assert 5 <= stopped < 500

  pair = start(2, *args)
  wait_for_step(story, stopped + 12, pair)
  pair[1].kill()
  began = time.monotonic()
  (code, _, err), _ = ends(pair, timeout=60)
  assert time.monotonic() - began < 20
  assert code == 1
  assert f'resuming from step {stopped}' in err
  assert err.splitlines()[-1].startswith('stopped: process 1 of 2 is gone')

  capfd.readouterr()
  main.run(args)
  assert 'resuming from step ' in capfd.readouterr().err
  a, b = lines(one), lines(story)
  assert [line['step'] for line in b] == list(range(1, 601))
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(
      [line[name] for line in b], [line[name] for line in a], rtol=2e-3
    )


def test_two_under_pmap_are_one_under_jit(run, tmp_path):
  """The same losses, weights and samples."""
  args = [*TINY, '--config.log.pictures_every=10', '--config.steps=20']
  one, two = tmp_path / 'one', tmp_path / 'two'
  main.run([*args, f'--workdir={one}'])
  pmap = '--config.parallel.engine=pmap'
  run(2, *args, pmap, f'--workdir={two}', devices=2)
  assert [x['step'] for x in lines(two)] == list(range(1, 21))
  for key in ('loss', 'grad_norm'):
    # Sums in another order, which training magnifies.
    np.testing.assert_allclose(
      *([x[key] for x in lines(folder)] for folder in (two, one)), rtol=2e-3
    )
  a, b = (test_main.weights(folder) for folder in (one, two))
  assert a.data == b.data
  chex.assert_trees_all_close((a.state, a.ema), (b.state, b.ema), atol=2e-3)
  for name in ('samples_10.png', 'samples.png'):
    a, b = (
      np.asarray(Image.open(folder / name)).astype(int) for folder in (one, two)
    )
    # A rounding may carry a value over the edge between two grays.
    assert np.mean(np.abs(a - b) > 2) < 0.01


def test_two_draw_what_one_draws(tiny_run, run, tmp_path):
  """In more than one batch, the last of which is not full."""
  common = ['--mode=sample', f'--workdir={tiny_run[0]}', '--num_samples=21']
  common.append('--config.sampler.batch_size=8')
  err = run(2, *common, f'--output={tmp_path / "two.npz"}')
  assert err.count('21 images: ') == 1
  main.run([*common, f'--output={tmp_path / "one.npz"}'])
  two, one = (
    np.load(tmp_path / f'{name}.npz')['images'].astype(int)
    for name in ('two', 'one')
  )
  assert one.shape == two.shape == (21, 8, 8, 1)
  # A rounding may carry a value over the edge between two grays.
  assert np.abs(one - two).max() <= 1
  assert np.mean(one != two) < 0.01


@pytest.mark.slow
def test_two_evaluate_as_one_does(tiny_run, start, tmp_path):
  """The bound; of scores there is a test beside the others."""
  found = []
  common = ['--mode=evaluate', '--config.evaluate.images=19']
  common += ['--config.evaluate.draws=3', '--config.evaluate.batch_size=8']
  for n in (1, 2):
    workdir = tmp_path / str(n)
    shutil.copytree(tiny_run[0], workdir)
    if n == 1:
      main.run([*common, f'--workdir={workdir}'])
    else:
      (code, out, err), other = ends(start(n, *common, f'--workdir={workdir}'))
      assert (code, other) == (0, (0, '', '')), err
      assert out.count('bits/dim') == 1
    found.append(record.read(workdir)['bounds'][0])
  one, two = found
  assert two['bits_per_dim'] == pytest.approx(one['bits_per_dim'], rel=1e-5)
  assert two['L_t_by_t']['t'] == one['L_t_by_t']['t']


@pytest.mark.slow
def test_four_two_and_one_go_on_with_each_others_runs(run, tmp_path):
  """With half of the state on each of two, and other devices a process."""
  args = [*TINY, '--config.checkpoint.every=100']
  fsdp = '--config.parallel.fsdp=2'
  run(1, *args, '--config.steps=30', f'--workdir={tmp_path / "one"}')
  first = tmp_path / 'four'
  run(4, *args, fsdp, '--config.steps=10', f'--workdir={first}')
  for n in (1, 2):
    workdir = tmp_path / f'four and {n}'
    shutil.copytree(first, workdir)
    err = run(n, *args, '--config.steps=20', f'--workdir={workdir}', devices=2)
    assert 'resuming from step 10' in err
    err = run(4, *args, '--config.steps=30', f'--workdir={workdir}')
    assert 'resuming from step 20' in err
    losses = [
      [line['loss'] for line in lines(x)] for x in (workdir, tmp_path / 'one')
    ]
    assert len(losses[0]) == 30
    np.testing.assert_allclose(*losses, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--mode=compare'], '--mode=compare is for one process, and there are 2'),
    ([*TINY, '--config.batch_size=17'], 'batch_size=17 is not divisible by 2'),
    ([*TINY, '--config.parallel.data=1'], 'must use all'),
  ],
  ids=lambda x: x[-1] if isinstance(x, list) else '',
)
def test_what_is_not_for_several_processes_is_one_line(
  start, tmp_path, args, message
):
  workdir = f'--workdir={tmp_path / "run"}'
  (code, out, err), other = ends(start(2, *args, workdir))
  assert (code, out, other) == (2, '', (2, '', ''))
  (line,) = err.splitlines()
  assert message in line


@pytest.mark.slow
def test_a_full_disk_stops_a_run_and_leaves_its_checkpoints(env, tmp_path):
  """A U-Net, whose weights are larger than every other file of its run."""
  workdir = tmp_path / 'run'
  command = [sys.executable, '-m', 'ddpm_jax.main', f'--workdir={workdir}']
  # Without a cache of compiled programs, which would get half a file.
  env = {k: v for k, v in env.items() if 'CACHE' not in k}

  def run(*words):
    return subprocess.run(words, env=env, capture_output=True, text=True)

  begun = run(*command, *conftest.UNET, '--config.steps=40')
  assert begun.returncode == 0, begun.stderr
  limit = 'ulimit -f 60; exec "$@"'
  done = run('bash', '-c', limit, 'bash', *command, '--config.steps=120')
  assert done.returncode == 2
  last = done.stderr.splitlines()[-1]
  assert last.startswith('error: ')
  assert 'File too large' in last
  assert checkpoint.steps(workdir / 'checkpoints') == [40]


# What two do is up to the last argument; no model, so nothing is compiled.
PEERS = """
import os, signal, sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from ddpm_jax import errors
from ddpm_jax.parallel import processes

port, n, me, what = int(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4]
with processes.together(
  f'127.0.0.1:{port}', n, me,
  start_timeout=60, peer_timeout=10, grace=0.5, can_stop=True,
):
  exec(what)
print('after', file=sys.stderr)
"""


@pytest.fixture
def peers(popen, env):
  """Starts n processes that do `what`."""

  def peers(n, what):
    port = str(free_port())
    command = [sys.executable, '-c', PEERS, port, str(n)]
    return [popen([*command, str(i), what], env) for i in range(n)]

  return peers


WAIT = 'multihost_utils.process_allgather(np.ones(1))'


def test_one_that_is_mistaken_ends_both_at_once(peers):
  """While process 0 waits for it, and would for minutes."""
  what = f'if me: raise errors.UserError("no such file")\n{WAIT}'
  first, other = ends(peers(2, what), timeout=60)
  assert first == (2, '', 'error: no such file (process 1)\n')
  assert other == (2, '', '')


def test_the_first_one_leaves_last(peers):
  """JAX aborts a process that the first one leaves behind."""
  slow = 'processes.leave = lambda *how: (time.sleep(2), leave(*how))'
  what = f'leave = processes.leave\nif me: {slow}\n'
  what += f'if me: raise errors.UserError("no such file")\n{WAIT}'
  first, other = ends(peers(2, what), timeout=60)
  assert first == (2, '', 'error: no such file (process 1)\n')
  assert other == (2, '', '')


def test_a_fault_of_ours_keeps_its_traceback_and_ends_both(peers):
  what = f'if me: print(1 / 0)\n{WAIT}'
  (code, _, err), (other, _, trace) = ends(peers(2, what), timeout=60)
  assert (code, other) == (1, 1)
  assert err == 'failed: ZeroDivisionError: division by zero (process 1)\n'
  assert 'Traceback' in trace


def test_they_end_together_and_the_first_one_speaks(peers):
  """Also where it has more to do than the others, or all exit with a code."""
  what = 'print("said", me)\nif not me: time.sleep(1)\nsys.exit(75)'
  assert ends(peers(2, what)) == [(75, 'said 0\n', ''), (75, '', '')]


def test_the_first_one_may_be_killed_too(peers):
  what = f'if not me: os.kill(os.getpid(), signal.SIGKILL)\n{WAIT}'
  (code, _, _), (other, _, err) = ends(peers(2, what), timeout=60)
  assert (code, other) == (-signal.SIGKILL, 1)
  assert 'stopped: process 0 of 2 is gone' in err


def test_a_name_is_shared_by_all_of_a_run_and_with_no_other(peers):
  """Of the temporary files that they exchange, in a folder of many runs."""
  what = 'print(processes.shared_name(), processes.shared_name(), '
  what += 'file=sys.stderr)'
  found = ends(peers(2, what), timeout=60)
  names = [err.splitlines()[0].split() for _, _, err in found]
  assert names[0] == names[1]
  assert len(set(names[0])) == 2


@pytest.mark.parametrize('name', ['SIGHUP', 'SIGUSR1'])
def test_a_lost_terminal_of_one_stops_all_at_the_same_step(peers, name):
  what = f"""
from ddpm_jax.parallel import stop
step = 0
with stop.requests() as asked:
  while not asked(step):
    step += 1
    time.sleep(0.02)
    if me and step in (20, 21):  # a shell sends one more
      os.kill(os.getpid(), signal.{name})
print('stopped at', *multihost_utils.process_allgather(np.array([step])))
"""
  (code, out, err), (other, _, _) = ends(peers(2, what), timeout=60)
  assert (code, other) == (0, 0), err
  first, second = re.fullmatch(
    r'stopped at \[(\d+)\] \[(\d+)\]\n', out
  ).groups()
  assert first == second
  assert int(first) >= 20
  assert 'stopping after this step\n' in err


@pytest.mark.slow
@pytest.mark.parametrize('hangs', [0, 1])
def test_one_that_hangs_is_named_in_one_line(peers, hangs):
  """Of peer_timeout = 10 seconds here."""
  what = f'if me == {hangs}: os.kill(os.getpid(), signal.SIGSTOP)\n{WAIT}'
  other = peers(2, what)[1 - hangs]
  ((code, _, err),) = ends([other], timeout=60)
  assert code == 1
  (line,) = err.splitlines()
  assert line.startswith(
    f'stopped: process {hangs} of 2 has sent no heartbeat for 10 seconds'
  )


@pytest.mark.slow
def test_all_may_be_stopped_for_longer_and_go_on(peers):
  pair = peers(2, f'{WAIT}\nprint("met", flush=True)\ntime.sleep(5)\n{WAIT}')
  assert pair[0].stdout.readline() == 'met\n'
  for number in (signal.SIGSTOP, signal.SIGCONT):
    for process in pair:
      process.send_signal(number)
    time.sleep(12 * (number == signal.SIGSTOP))
  assert [code for code, _, _ in ends(pair, timeout=60)] == [0, 0]


def meet(n, *others, before=()):
  """What process 0 of n, and what each of `others` (count, index), is told.

  `before` are strangers, and what they say.
  """
  port = free_port()
  told = queue.SimpleQueue()

  def come(name, count, index):
    try:
      processes._meet(f'127.0.0.1:{port}', count, index)
      told.put((name, 'welcome'))
    except errors.UserError as error:
      told.put((name, str(error)))

  calls = [('first', n, 0)]
  calls += [(f'{count}:{index}', count, index) for count, index in others]
  threads = [threading.Thread(target=come, args=x, daemon=True) for x in calls]
  threads[0].start()
  links = []
  for said in before:
    late = time.monotonic() + 10
    while time.monotonic() < late:
      with contextlib.suppress(ConnectionRefusedError):
        links.append(socket.create_connection(('127.0.0.1', port)))
        links[-1].sendall(said)
        break
      time.sleep(0.01)
  for thread in threads[1:]:
    thread.start()
  found = dict(told.get(timeout=30) for _ in calls)
  for link in links:
    link.close()
  return found


def test_all_that_were_told_the_same_meet():
  found = meet(3, (3, 2), (3, 1))
  assert found == dict.fromkeys(['first', '3:1', '3:2'], 'welcome')


@pytest.mark.parametrize(
  ('n', 'others', 'message'),
  [
    (
      2,
      [(3, 2)],
      'process 2 was started with --num_processes=3, and process 0',
    ),
    (
      3,
      [(2, 1)],
      'process 1 was started with --num_processes=2, and process 0',
    ),
    (3, [(3, 1), (3, 1)], 'two processes were started with --process_id=1'),
    (2, [(2, 0)], ''),  # Its address is taken.
  ],
)
def test_numbers_that_differ_are_named_to_all(n, others, message):
  if message:
    found = meet(n, *others)
    assert all(message in said for said in found.values()), found
  else:
    port = free_port()
    with processes._listen('127.0.0.1', port), pytest.raises(OSError):  # noqa: PT011
      processes._meet(f'127.0.0.1:{port}', n, 0)


def test_strangers_do_not_keep_processes_from_meeting():
  """They say nothing, too much, or what is no text."""
  deep = b'[' * 64
  before = [b'', b'GET / HTTP/1.1\r\n\r\n', bytes(range(128, 192)), deep]
  before += [b'["ddpm_jax", 2, "1"]'.ljust(64), b'["ddpm_jax", 2]'.ljust(64)]
  before += [b''] * 3 * processes.PENDING
  found = meet(2, (2, 1), before=before)
  assert set(found.values()) == {'welcome'}


def test_links_are_for_those_who_know_the_token(monkeypatch):
  """Bytes that are no text ended the first process."""
  monkeypatch.setattr(processes, 'CONNECT', 3.0)
  token = '0123456789abcdef' * 2
  with processes._listen('127.0.0.1', 0) as server:
    port = server.getsockname()[1]
    links = []
    for said in (
      bytes(range(200, 241)),
      'µ'.encode() * 21,
      b'x' * 41,
      f'{token} 9       '.encode(),
      f'{token}    µ   '.encode(),
      f'{token} {1:8}'.encode(),
    ):
      links.append(socket.create_connection(('127.0.0.1', port)))
      links[-1].sendall(said)
    found = processes._accept(server, 2, token)
  assert list(found) == [1]
  assert found[1].getpeername() == links[-1].getsockname()
  for link in [*links, *found.values()]:
    link.close()


def test_one_that_comes_when_others_have_begun_is_told(monkeypatch):
  monkeypatch.setattr(processes, 'CONNECT', 1.0)
  port = free_port()
  with processes._listen('127.0.0.1', port) as server:

    def answer():
      while True:
        link, _ = server.accept()
        with link:
          link.sendall(b'\0\0\x18\x04')  # as JAX's server does

    threading.Thread(target=answer, daemon=True).start()
    with pytest.raises(errors.RunError, match='have begun without process 2'):
      processes._meet(f'127.0.0.1:{port}', 3, 2)


@pytest.mark.parametrize(
  ('host', 'address'),
  [
    ('127.0.0.1', '127.0.0.1'),
    ('localhost', '127.0.0.1'),
    ('127.0.0.2', '127.0.0.2'),
    ('192.0.2.7', ''),  # of another machine, or of a router before this one
    ('no-such-host.invalid', ''),
  ],
)
def test_a_port_is_open_at_the_address_that_was_named(
  host, address, monkeypatch
):
  monkeypatch.delenv('JAX_COORDINATOR_BIND_ADDRESS', raising=False)
  assert processes._own_address(host) == address
  bound = processes._bind_address(f'{host}:8476')
  assert bound == (f'{address}:8476' if address else None)


def test_a_name_that_only_this_machine_knows_as_its_own_is_not_narrowed(
  monkeypatch,
):
  """As Debian's /etc/hosts has it: others know it by another address."""
  where = [(socket.AF_INET, socket.SOCK_STREAM, 6, '', ('127.0.1.1', 0))]
  monkeypatch.setattr(socket, 'getaddrinfo', lambda *args: where)
  assert processes._own_address('this-machine') == ''


def listening(process):
  """The addresses, hexadecimal as in /proc/net/tcp, at which it listens."""
  inodes = set()
  for link in pathlib.Path(f'/proc/{process.pid}/fd').iterdir():
    with contextlib.suppress(OSError):
      inodes |= set(re.findall(r'socket:\[(\d+)\]', os.readlink(link)))
  found = set()
  for name in ('tcp', 'tcp6'):
    file = pathlib.Path(f'/proc/{process.pid}/net/{name}')
    rows = [x.split() for x in file.read_text().splitlines()[1:]]
    found |= {x[1] for x in rows if x[3] == '0A' and x[9] in inodes}
  return found


def test_on_one_machine_the_coordinator_does_not_listen_to_others(peers):
  pair = peers(2, 'print("met", flush=True)\nsys.stdin.read()')
  assert pair[0].stdout.readline() == 'met\n'
  port = f':{int(pair[0].args[3]):04X}'
  found = [x for x in listening(pair[0]) if x.endswith(port)]
  assert found
  # 127.0.0.1, also as IPv6 has it
  assert all(x.removesuffix(port).endswith('0100007F') for x in found)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--num_processes=0'], '--num_processes=0 must be at least 1'),
    (['--num_processes=2'], '--num_processes needs --coordinator'),
    (['--coordinator=a:1'], '--coordinator needs --num_processes'),
    (['--process_id=1'], '--process_id needs --coordinator'),
    (['--coordinator=a:1', '--process_id=1'], 'needs --num_processes'),
    (['--coordinator=a:1', '--num_processes=2'], 'needs --process_id'),
    (['--coordinator=a', '--num_processes=2', '--process_id=1'], 'HOST:PORT'),
    (['--coordinator=a:b', '--num_processes=2', '--process_id=1'], 'HOST:PORT'),
    (['--coordinator=:1', '--num_processes=2', '--process_id=1'], 'HOST:PORT'),
    (['--coordinator=a:1', '--num_processes=2', '--process_id=2'], '0..1'),
    (
      ['--coordinator=a:1', '--num_processes=2', '--process_id=-1'],
      'at least 0',
    ),
    (['--start_timeout=0'], 'start_timeout=0 must be at least 1'),
    (['--peer_timeout=1'], 'peer_timeout=1 is not 2 or more'),
  ],
)
def test_flags_that_do_not_do_are_one_line(flags, message):
  with pytest.raises(errors.UserError) as caught:
    main.run([f'--config={conftest.DIGITS}', *flags])
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


def test_help_needs_no_jax():
  program = """
import sys
from ddpm_jax import main
try:
  main.run(['--help'])
except SystemExit as end:
  sys.exit(end.code or 'jax' in sys.modules)
sys.exit('no end')
"""
  command = [sys.executable, '-c', program]
  out = subprocess.check_output(command, cwd=ROOT, text=True)
  assert '--coordinator HOST:PORT' in out


def test_one_that_nobody_comes_to_does_not_wait_for_ever(start, tmp_path):
  args = ['--start_timeout=1', *TINY, f'--workdir={tmp_path}']
  found = ends([*start(2, *args, only=[0]), *start(2, *args, only=[1])], 60)
  for i, (code, _, err) in enumerate(found):
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith(f'stopped: process {i} of 2 has not met the others')
    assert 'within 1 seconds (--start_timeout)' in line


IN_A_CLUSTER = """
import sys
import jax
from ddpm_jax.parallel import processes
with processes.together():
  print(jax.process_index(), 'of', jax.process_count(), file=sys.stderr)
"""


def test_in_a_cluster_they_find_each_other(popen, env):
  """By the variables that Slurm's srun sets; the port follows from its job."""
  with socket.socket() as probe:
    for job in range(os.getpid(), os.getpid() + 4096):
      with contextlib.suppress(OSError):
        probe.bind(('', 61440 + job % 4096))
        break
  slurm = {
    'SLURM_JOB_ID': str(job),
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': '2',
  }
  pair = [
    popen(
      [sys.executable, '-c', IN_A_CLUSTER],
      env | slurm | {'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i)},
    )
    for i in range(2)
  ]
  assert ends(pair) == [(0, '', '0 of 2\n'), (0, '', '1 of 2\n')]


CLUSTERS = {
  'nothing': ({}, False),
  'Slurm, in srun': (
    {'SLURM_STEP_NODELIST': 'a,b', 'SLURM_NTASKS': '2', 'SLURM_PROCID': '0'},
    True,
  ),
  'Slurm, one task': ({'SLURM_STEP_NODELIST': 'a', 'SLURM_NTASKS': '1'}, False),
  'Slurm, not in srun': ({'SLURM_NTASKS': '2'}, False),
  'Slurm, a shell of salloc': (
    {
      'SLURM_STEP_NODELIST': 'a',
      'SLURM_NTASKS': '4',
      'SLURM_STEP_NUM_TASKS': '1',
    },
    False,
  ),
  'Slurm, a shell of srun --pty': (
    {
      'SLURM_STEP_NODELIST': 'a',
      'SLURM_NTASKS': '4',
      'SLURM_STEP_NUM_TASKS': '4',
      'SLURM_PTY_PORT': '12345',
    },
    False,
  ),
  'Slurm, in a script of srun': (
    {
      'SLURM_STEP_NODELIST': 'a',
      'SLURM_NTASKS': '4',
      'SLURM_TASK_PID': str(os.getppid()),
    },
    True,
  ),
  'MPI': ({'OMPI_COMM_WORLD_SIZE': '4'}, True),
  'GKE, hosts of a slice': ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
  'GKE, one host': ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
  'Kubernetes, not a job': ({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, False),
  'Kubernetes, an indexed job': (
    {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '0'},
    True,
  ),
}


@pytest.fixture
def no_cluster(monkeypatch):
  for key in list(os.environ):
    if key.startswith(('SLURM_', 'OMPI_', 'TPU_', 'KUBERNETES_', 'JOB_')):
      monkeypatch.delenv(key)


@pytest.mark.parametrize(
  'left', [{'SLURM_TASK_PID': '999999999'}, {'SLURM_STEP_NUM_TASKS': '3'}]
)
def test_what_slurm_left_behind_is_said_and_not_waited_for(
  left, no_cluster, monkeypatch
):
  for key, value in {
    'SLURM_JOB_ID': '7',
    'SLURM_STEP_NODELIST': 'a',
    'SLURM_NTASKS': '2',
    **left,
  }.items():
    monkeypatch.setenv(key, value)
  with pytest.raises(errors.UserError, match='--num_processes=1'):
    processes.found()
  with processes.together(count=1):
    pass  # which does not look


@pytest.mark.parametrize('name', CLUSTERS)
def test_a_cluster_is_known_by_its_variables(name, no_cluster, monkeypatch):
  variables, several = CLUSTERS[name]
  for key, value in variables.items():
    monkeypatch.setenv(key, value)
  assert processes.found() == several


# A state of known values, laid out over all devices of all processes.
STATE = """
import functools
import jax, jax.numpy as jnp, numpy as np
from ddpm_jax.parallel import meshes
from ddpm_jax.storage import checkpoint

def state(step):
  x = jnp.arange(64 * 6 * 64, dtype=jnp.float32) * 0.1 + step
  x = x.reshape(64, 6, 64)
  return {'kernel': x, 'bias': x[0, 0].astype(jnp.bfloat16), 'n': x[0, 0, 0]}

mesh = meshes.make_mesh(fsdp=jax.device_count())
abstract = meshes.abstract_state(functools.partial(state, 0), mesh)

def save(folder, *steps):
  checkpoints = checkpoint.open(folder, keep=9)
  for step in steps:
    made = meshes.init_state(functools.partial(state, step), mesh)
    data = {'next_index': step}
    checkpoint.save(
      checkpoints, step, state=made, ema=made, data=data, config={}
    )
  checkpoint.close(checkpoints)

def restore(source):
  got = checkpoint.restore(source, abstract, abstract)
  want = meshes.init_state(functools.partial(state, got.step), mesh)
  for tree in got.state, got.ema:
    for a, b in zip(*map(jax.tree.leaves, (tree, want)), strict=True):
      assert a.sharding == b.sharding
      for x, y in zip(a.addressable_shards, b.addressable_shards):
        assert np.asarray(x.data).tobytes() == np.asarray(y.data).tobytes()
  assert got.data == {'next_index': got.step}
  return got.step
"""


def here(what):
  """Runs the same in this process, which has eight devices."""
  scope = {}
  exec(STATE, scope)
  return eval(what, scope)


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_is_read_by_one_bit_for_bit(
  peers, tmp_path
):
  for code, _, err in ends(peers(4, f'{STATE}\nsave({str(tmp_path)!r}, 3)')):
    assert (code, err) == (0, 'after\n')
  assert here(f'restore({str(tmp_path)!r})') == 3


@pytest.mark.slow
@pytest.mark.parametrize(('there', 'now'), [(4, 2), (2, 4), (1, 4)])
def test_checkpoints_go_from_some_processes_to_others(
  peers, tmp_path, there, now
):
  folder = str(tmp_path)
  if there == 1:
    here(f'save({folder!r}, 3)')
  else:
    assert {
      x[0] for x in ends(peers(there, f'{STATE}\nsave({folder!r}, 3)'))
    } == {0}
  what = f'{STATE}\nassert restore({folder!r}) == 3'
  assert {x[0] for x in ends(peers(now, what))} == {0}


def array_file(folder):
  """The file with the array data."""
  files = (p for p in folder.rglob('*') if p.is_file())
  return max(files, key=lambda p: p.stat().st_size)


@pytest.mark.slow
@pytest.mark.parametrize('damage', ['flipped', 'missing'])
def test_a_damaged_checkpoint_is_passed_over_by_all(peers, tmp_path, damage):
  here(f'save({str(tmp_path)!r}, 1, 2)')
  file = array_file(tmp_path / '2/state')
  if damage == 'missing':
    file.unlink()
  else:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 8
    file.write_bytes(data)
  # All agree on the one before, rename, and save the step again.
  what = f"""{STATE}
checkpoints = checkpoint.open({str(tmp_path)!r}, keep=9)
assert restore(checkpoints) == 1
checkpoint.close(checkpoints)
save({str(tmp_path)!r}, 2)
"""
  (code, _, err), (other, _, noise) = ends(peers(2, what))
  assert (code, other, noise) == (0, 0, 'after\n'), err
  assert '/2 is damaged, not used' in err
  assert here(f'restore({str(tmp_path)!r})') == 2


@pytest.mark.slow
def test_one_full_disk_ends_all_and_the_old_checkpoints_stay(peers, tmp_path):
  here(f'save({str(tmp_path)!r}, 1)')
  what = f"""{STATE}
import resource
if me:
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))
save({str(tmp_path)!r}, 2)
"""
  (code, _, err), (other, _, _) = ends(peers(2, what), timeout=200)
  assert (code, other) == (2, 2)
  assert re.fullmatch(
    r'error: cannot save .*File too large.* \(process 1\)\n', err
  )
  assert here(f'restore({str(tmp_path)!r})') == 1


@pytest.mark.slow
def test_one_killed_while_saving_leaves_the_checkpoint_before(peers, tmp_path):
  what = STATE.replace('64 * 6 * 64', '64 * 6 * 64 * 256')
  what = what.replace('reshape(64,', 'reshape(64 * 256,')
  what += f'\nsave({str(tmp_path)!r}, *range(1, 100))'
  processes = peers(2, what)
  late = time.monotonic() + 300
  while not list(tmp_path.glob('[3-9].orbax-checkpoint-tmp')):
    assert all(p.poll() is None for p in processes), ends(processes)
    assert time.monotonic() < late
    time.sleep(0.002)
  processes[1].kill()
  (code, _, err), _ = ends(processes, timeout=60)
  assert code == 1
  assert err.startswith('stopped: process 1 of 2 is gone')
  assert list(tmp_path.glob('*-tmp'))  # It was in the midst of it.
  whole = what.rpartition('\n')[0]
  scope = {}
  exec(whole, scope)
  assert scope['restore'](str(tmp_path)) in range(1, 9)


def assert_same_run(a, b):
  """To the last bit: the metrics, and all that the last checkpoint holds."""
  assert lines(a) == lines(b)
  (*_, step) = checkpoint.steps(a / 'checkpoints')
  assert checkpoint.steps(b / 'checkpoints')[-1] == step
  about = [
    json.loads((x / f'checkpoints/{step}/about/data.json').read_text())
    for x in (a, b)
  ]
  # It holds the fingerprint of every array, and the position in the data.
  assert about[0]['arrays'].keys() == about[1]['arrays'].keys()
  assert about[0] == about[1]


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_bit_for_bit(
  popen, env, tmp_path
):
  calm, stormy = tmp_path / 'calm', tmp_path / 'stormy'

  def launch(workdir):
    args = [*TINY, '--config.steps=400', f'--workdir={workdir}']
    local = [sys.executable, 'launch/local.py', '--processes=2', '--backoff=0']
    return popen([*local, '--restarts=30', *args], env)

  began = time.monotonic()
  process = launch(calm)
  wait_for_step(calm, 1, [process])
  start_up = time.monotonic() - began
  ((code, _, err),) = ends([process])
  assert code == 0, err
  loop = time.monotonic() - began - start_up

  def step():
    return max((line['step'] for line in lines(stormy)), default=0)

  # Every other moment is of starting up; the rest are
  # of the loop, and not so long after its start that 20 come to its end.
  draw = random.Random(0)
  process, at = launch(stormy), []
  for i in range(20):
    before, late = step(), time.monotonic() + 900
    while i % 2 and step() == before:
      assert time.monotonic() < late
      time.sleep(0.01)
    span = loop / 24 if i % 2 else start_up / 2  # it was cold then
    moment = time.monotonic() + draw.uniform(0, span)
    while time.monotonic() < moment or len(conftest.children(process)) < 2:
      assert process.poll() is None, (at, process.communicate())
      time.sleep(0.005)
    os.kill(draw.choice(conftest.children(process)), signal.SIGKILL)
    at.append(step())
  ((code, _, err),) = ends([process])
  assert code == 0, err
  assert err.count('restart ') >= 15  # some were killed while ending
  print('killed at steps', at)
  assert_same_run(calm, stormy)


def test_the_last_line_is_not_followed_by_a_bar():
  # A bar that is drawn again would hide why the process ended.
  script = (
    'import tqdm\n'
    'from ddpm_jax.parallel import processes\n'
    'bar = tqdm.tqdm(total=4, mininterval=0)\n'
    'bar.update(1)\n'
    "processes.leave(3, 'stopped: by another process')\n"
  )
  done = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, cwd=ROOT
  )
  assert done.returncode == 3
  lines = [line for line in done.stderr.splitlines() if line.strip()]
  assert '1/4' in done.stderr  # the bar was drawn
  assert lines[-1] == 'stopped: by another process', done.stderr
