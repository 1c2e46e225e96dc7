"""Several processes: how they meet, and how they end together.

JAX notices a lost process only by missing heartbeats, and then aborts; after an
exception in one process the others wait for ever. So each process keeps a
connection to process 0. If a connection breaks, or an error is reported over
it, all processes end at once, with one line.
"""

import contextlib
import glob
import importlib.util
import ipaddress
import json
import logging
import math
import os
import secrets
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any
from typing import NoReturn

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from ddpm_jax import errors
from ddpm_jax import streams

# Seconds.
CONNECT = 20.0
GREETING = 5.0  # for a new connection to identify itself
LINGER = 5.0  # for the others to exit, after they are told to
LATER = 30  # added to `peer_timeout` for the heartbeats of JAX
# Connections that may wait to identify themselves; one more closes the oldest.
PENDING = 64
# The variable that tells JAX at which HOST:PORT process 0 listens.
BIND = 'JAX_COORDINATOR_BIND_ADDRESS'


def is_primary() -> bool:
  """Whether this is process 0, which prints and writes for all."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def wait(what: str) -> None:
  """Waits until all processes have called this."""
  multihost_utils.sync_global_devices(f'ddpm_jax: {what}')


@contextlib.contextmanager
def together(
  coordinator: str | None = None,
  count: int | None = None,
  index: int | None = None,
  *,
  start_timeout: int = 300,
  peer_timeout: int = 100,
  grace: float = 2.0,
  can_stop: bool = False,
) -> Iterator[None]:
  """Joins the other processes, if there are any, and ends with them.

  If one of several processes raises inside, process 0 prints the error (see
  `errors.verdict`) and all processes exit: the error does not propagate.

  Args:
    coordinator: HOST:PORT of process 0. If None, JAX detects the cluster, if
      there is one (see `found`).
    count: Number of processes; 1 does not look for others.
    index: Number of this process.
    start_timeout: Seconds within which all processes must have joined.
    peer_timeout: Seconds after which a silent process counts as lost. A process
      that is killed is noticed at once; this is for processes that hang and for
      lost machines.
    grace: Seconds that a failing process waits for the others to report the
      cause, before it ends them itself.
    can_stop: Whether SIGTERM is a request that `stop.requests` reads.

  Raises:
    UserError: If a flag is missing or wrong.
  """
  global _links
  check(coordinator, count, index, start_timeout, peer_timeout)
  if count == 1 or not (coordinator or found()):
    yield
    return
  # With this service SIGTERM does nothing until a loop looks for it.
  jax.config.update('jax_enable_preemption_service', can_stop)
  who = 'this process' if index is None else f'process {index} of {count}'
  where = f' at {coordinator}' if coordinator else ''
  with contextlib.ExitStack() as stack:
    with _within(
      start_timeout,
      f'stopped: {who} has not met the others{where} within {start_timeout} '
      'seconds (--start_timeout): start all of them with the same flags except '
      '--process_id, or set --num_processes=1 if there is only one',
    ):
      try:
        if coordinator and count is not None and index is not None:
          _meet(coordinator, count, index)
        jax.distributed.initialize(
          coordinator,
          count,
          index,
          cluster_detection_method='deactivate' if coordinator else None,
          # Longer than our own timeouts, as JAX aborts with pages of output.
          initialization_timeout=start_timeout + 60,
          heartbeat_timeout_seconds=peer_timeout + LATER,
          coordinator_bind_address=_bind_address(coordinator),
        )
      except (errors.UserError, errors.RunError):
        raise
      except (OSError, RuntimeError, ValueError) as error:
        raise errors.UserError(
          f'{who} cannot join others ({" ".join(str(error).split())}): set '
          '--coordinator, --num_processes and --process_id; or '
          '--num_processes=1'
        ) from error
      stack.enter_context(_stdout_of_the_first())
      _links = _Links(
        _host(coordinator) if coordinator else _address(), peer_timeout, grace
      )
    if not is_primary():
      logging.getLogger().setLevel(logging.ERROR)
    try:
      with one_fails_all():
        yield
    finally:  # Reached after success, or if all exit with the same code.
      _links.finish()
      jax.distributed.shutdown()


@contextlib.contextmanager
def one_fails_all(*but: type[BaseException]) -> Iterator[None]:
  """Ends all processes if an exception is raised inside, except types `but`.

  Put it inside of contexts that wait for the other processes on exit.
  """
  try:
    yield
  except BaseException as error:
    if not isinstance(error, (SystemExit, *but)):
      end_all(error)
    raise


def end_all(error: BaseException) -> None:
  """Ends all processes because of `error`; returns if there is only one."""
  if _links:
    _links.fail(error)


def only_one(what: str) -> None:
  """Raises UserError if there are several processes."""
  if jax.distributed.is_initialized() and jax.process_count() > 1:
    raise errors.UserError(
      f'{what} is for one process, and there are {jax.process_count()}: start '
      'only one, with --num_processes=1'
    )


def check(
  coordinator: str | None,
  count: int | None,
  index: int | None,
  start_timeout: int,
  peer_timeout: int,
) -> None:
  """Raises UserError for the first flag that is missing or wrong."""
  if count is not None and count < 1:
    raise errors.UserError(f'--num_processes={count} is not positive')
  if start_timeout < 1:
    raise errors.UserError(f'--start_timeout={start_timeout} is not positive')
  if peer_timeout < 2:
    raise errors.UserError(f'--peer_timeout={peer_timeout} is not 2 or more')
  if count == 1 and index in (None, 0):
    return
  flags = {
    '--coordinator=HOST:PORT': coordinator,
    '--num_processes=N': count,
    '--process_id=I': index,
  }
  given = [name for name, value in flags.items() if value is not None]
  missing = [name for name, value in flags.items() if value is None]
  if given and missing:
    raise errors.UserError(f'{given[0].split("=")[0]} needs {missing[0]} too')
  if coordinator is None or count is None or index is None:
    return
  host, port = _host(coordinator), coordinator.rpartition(':')[2]
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise errors.UserError(
      f'--coordinator={coordinator} is not HOST:PORT, such as 10.0.0.2:8476'
    )
  if not 0 <= index < count:
    raise errors.UserError(
      f'--process_id={index} is not in 0..{count - 1}, of {count} processes'
    )


def found() -> bool:
  """Whether this is one of several processes that JAX can detect by itself.

  Slurm and MPI set the number of processes, a Kubernetes pod that it belongs to
  an indexed job, and GKE the TPU hosts. A TPU VM is recognized by its chips and
  their library; JAX asks its metadata server for the number of hosts.
  """
  env = os.environ
  if _is_task_of_slurm():
    return True
  counts = (env.get('OMPI_COMM_WORLD_SIZE', '1'),)
  hosts = env.get('TPU_PROCESS_ADDRESSES') or env.get('TPU_WORKER_HOSTNAMES')
  in_job = 'KUBERNETES_SERVICE_HOST' in env and 'JOB_COMPLETION_INDEX' in env
  if any(n not in ('', '1') for n in counts) or (hosts and ',' in hosts):
    return True
  if in_job and not hosts:
    return True  # JAX asks the cluster, with the package `kubernetes`
  chips = glob.glob('/dev/accel[0-9]*') + glob.glob('/dev/vfio/[0-9]*')
  return bool(
    chips
    and not hosts
    and 'TPU_SKIP_MDS_QUERY' not in env  # JAX sets it where there are no TPUs
    and importlib.util.find_spec('libtpu')
  )


def _is_task_of_slurm() -> bool:
  """Whether srun started this program as one of several tasks.

  All programs that a task starts inherit the variables of srun. A shell of
  `salloc` or `srun --pty` is one process, however many tasks were requested.

  Raises:
    UserError: If the variables belong to the tasks of another program.
  """
  env = os.environ
  asked = env.get('SLURM_NTASKS', '1')
  count = env.get('SLURM_STEP_NUM_TASKS', asked)
  if 'SLURM_STEP_NODELIST' not in env or count in ('', '1'):
    return False
  if 'SLURM_PTY_PORT' in env:
    return False
  task = env.get('SLURM_TASK_PID', '')
  if count != asked or (task and task not in _ancestors()):
    raise errors.UserError(
      f'the variables of Slurm are for {asked} tasks, and this process was not '
      'started as one of them: set --num_processes=1 if there is only one, or '
      '--coordinator, --num_processes and --process_id'
    )
  return True


def _ancestors() -> list[str]:
  """Returns the ids of this process, its parent and so on, read from /proc."""
  every, process = [], str(os.getpid())
  with contextlib.suppress(OSError):
    while process != '0':
      every.append(process)
      with open(f'/proc/{process}/stat') as file:
        # The name of the process is in brackets and may contain any characters.
        process = file.read().rpartition(')')[2].split()[1]
  return every


@contextlib.contextmanager
def _within(seconds: float, message: str) -> Iterator[None]:
  """Ends this process if the block inside takes longer."""
  timer = threading.Timer(seconds, leave, (1, message))
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


class _Links:
  """The open connections: of process 0 to all others, or of this one to it.

  They carry lines of JSON: `["here"]`, the heartbeat; `["done"]`; and
  `["end", code, message]`.
  """

  def __init__(self, host: str, peer_timeout: float, grace: float) -> None:
    self.sockets = _connect(host)
    self.peer_timeout = peer_timeout
    self.grace = grace
    self.done = {index: threading.Event() for index in self.sockets}
    self.ending = threading.Lock()  # never released: only one thread ends all
    self.over = threading.Event()
    self.silent = dict.fromkeys(self.sockets, 0.0)  # seconds
    for index in self.sockets:
      threading.Thread(target=self.listen, args=(index,), daemon=True).start()
    threading.Thread(target=self.watch, daemon=True).start()

  def send(self, *message: Any) -> None:
    for link in self.sockets.values():
      with contextlib.suppress(OSError):
        link.sendall(json.dumps(message).encode() + b'\n')

  def listen(self, index: int) -> None:
    """Handles the messages of process `index` until its connection closes."""
    with contextlib.suppress(OSError):
      for line in self.sockets[index].makefile():
        kind, *rest = json.loads(line)
        self.silent[index] = 0.0
        if kind == 'here':
          continue
        if kind == 'done':
          self.done[index].set()
        elif is_primary():
          time.sleep(self.grace)  # This process may fail for the same cause.
          self.end(*rest)
        else:
          leave(rest[0], '')
    if not self.done[index].is_set():
      self.end(
        1,
        f'stopped: process {index} of {jax.process_count()} is gone: it was '
        'killed, or its machine was lost. Start all again: a run resumes from '
        'its newest checkpoint',
      )

  def watch(self) -> None:
    """Sends heartbeats, and ends all processes if one is silent for too long.

    Adds up its own pauses instead of reading a clock: if all processes were
    suspended for an hour and continue, none counts as lost.
    """
    pause = min(2.0, self.peer_timeout / 5)
    self.send('here')
    while not self.over.wait(pause):
      self.send('here')
      for index in self.silent:
        self.silent[index] += pause
        if self.silent[index] > self.peer_timeout:
          self.end(
            1,
            f'stopped: process {index} of {jax.process_count()} has sent no '
            f'heartbeat for {self.peer_timeout:g} seconds (--peer_timeout): it '
            'hangs, or its machine was lost. Start all again: a run resumes '
            'from its newest checkpoint',
          )

  def fail(self, error: BaseException) -> NoReturn:
    """Ends all processes because of `error`."""
    # The cause may be a lost process, which `listen` reports in this time.
    time.sleep(self.grace)
    code, message = errors.verdict(error)
    if not errors.expected(error):
      traceback.print_exception(error)
    if not is_primary():
      self.send('end', code, f'{message} (process {jax.process_index()})')
      time.sleep(3 * self.grace)  # Process 0 prints it, and ends this process.
    self.end(code, message)

  def end(self, code: int, message: str) -> NoReturn:
    self.ending.acquire()
    self.send('end', code, message)
    self.wait_for_others_to_leave()
    leave(code, message)

  def wait_for_others_to_leave(self) -> None:
    """Waits until their connections are closed, for at most `LINGER` seconds.

    Closing a socket with unread bytes resets the connection and drops unsent
    bytes: the others would not receive the reason to end.
    """
    late = time.monotonic() + LINGER
    for link in self.sockets.values():
      with contextlib.suppress(OSError):
        while (left := late - time.monotonic()) > 0:
          ready, _, _ = select.select([link], [], [], left)
          if ready and not link.recv(4096):
            break

  def finish(self) -> None:
    """Waits until all processes are done."""
    if not is_primary():
      self.send('done')
    for done in self.done.values():
      done.wait()
    if is_primary():
      self.send('done')
    self.over.set()


# Set once this process has joined others.
_links: _Links | None = None


def leave(code: int, message: str) -> NoReturn:
  """Exits at once. A usual exit of Python would wait for other processes."""
  try:
    # Clears a progress bar, which is not drawn again: this block never ends.
    with tqdm.tqdm.external_write_mode(sys.stderr):
      if message:
        print(message, file=sys.stderr)
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
  finally:
    os._exit(code)


def _meet(coordinator: str, count: int, index: int) -> None:
  """Compares the flags of all processes, at the address that JAX uses next.

  If they differed, JAX would abort or wait for ever. A process that comes after
  all have met gets no answer.

  Raises:
    UserError: If `count` differs between processes, or two have one `index`.
    RunError: If the others have begun without this process.
    OSError: If process 0 cannot listen.
  """
  host, port = _host(coordinator), int(coordinator.rpartition(':')[2])
  if not index:
    own = int(os.environ.get(BIND, coordinator).rpartition(':')[2])
    with _listen(_own_address(host), own) as server:
      _meet_all(server, count)
    return
  hello = json.dumps(['ddpm_jax', count, index]).encode().ljust(_HELLO)
  late = math.inf
  while time.monotonic() < late:
    said = _ask(host, port, hello)
    if said == 'welcome':
      return
    if said.startswith('error: '):
      raise errors.UserError(said.removeprefix('error: '))
    if said and late == math.inf:  # It may be an earlier run that is ending.
      late = time.monotonic() + CONNECT
    time.sleep(0.2)
  raise errors.RunError(
    f'at {coordinator} others have begun without process {index} of {count}, '
    'or another program listens: start all with the same --num_processes'
  )


def _ask(host: str, port: int, hello: bytes) -> str:
  """Returns the answer of process 0, or '' if nobody answers."""
  answer = b''
  with (
    contextlib.suppress(OSError),
    socket.create_connection((host, port), CONNECT) as link,
  ):
    link.settimeout(None)  # until all have joined; `_within` has a limit
    link.sendall(hello)
    while more := link.recv(_ANSWER - len(answer)):
      answer += more
  return answer.decode(errors='replace').strip()


# Bytes of the messages that processes exchange when they meet.
_HELLO = 64
_ANSWER = 256


def _meet_all(server: socket.socket, count: int) -> None:
  """Welcomes all other processes, or tells all of them what is wrong."""
  came: dict[int, socket.socket] = {}
  links: list[socket.socket] = []
  wrong = ''
  try:
    for link, said in _greetings(server, _HELLO):
      hello = _read_hello(said)
      if hello is None:
        link.close()
        continue
      total, index = hello
      links.append(link)
      if total != count:
        wrong = (
          f'process {index} was started with --num_processes={total}, and '
          f'process 0 with --num_processes={count}: start all with the same '
          'flags except --process_id'
        )
      elif index == 0 or (index in came and _is_there(came[index])):
        wrong = f'two processes were started with --process_id={index}'
      came[index] = link
      if wrong:
        raise errors.UserError(wrong)
      if len(came) == count - 1:
        return
  finally:
    answer = f'error: {wrong}' if wrong else 'welcome'
    for link in links:
      with contextlib.suppress(OSError):
        link.sendall(answer.encode().ljust(_ANSWER))
      link.close()


def _read_hello(said: bytes) -> tuple[int, int] | None:
  """Returns (count, index) of a greeting, or None if it is not one of ours."""
  try:
    name, total, index = json.loads(said)
  except (ValueError, TypeError, RecursionError):
    return None
  numbers = type(total) is int and type(index) is int
  if name != 'ddpm_jax' or not numbers or not 0 <= index < total:
    return None
  return total, index


def _is_there(link: socket.socket) -> bool:
  """Whether the other side, which sends nothing now, is still connected."""
  try:
    return link.recv(1, socket.MSG_DONTWAIT) != b''
  except BlockingIOError:
    return True
  except OSError:
    return False


def _connect(host: str) -> dict[int, socket.socket]:
  """Returns {process: connection}, given the host of process 0."""
  me, count = jax.process_index(), jax.process_count()
  with contextlib.ExitStack() as stack:
    port = 0
    if not me:
      server = stack.enter_context(_listen(_own_address(host), 0))
      port = server.getsockname()[1]
    place = json.dumps([host, port, secrets.token_hex(16)]).encode()
    host, port, token = json.loads(_of_the_first(place.ljust(512)))
    try:
      if me:
        link = socket.create_connection((host, port), CONNECT)
        link.settimeout(None)
        link.sendall(f'{token} {me:8}'.encode())
        return {0: link}
      return _accept(server, count, token)
    except OSError as error:
      logging.warning(
        'process %d: no connection between process 0 (%s, port %d) and others '
        '(%s): only JAX will notice, late, if one fails or is killed',
        *(me, host, port, error),
      )
      return {}


def _of_the_first(data: bytes) -> bytes:
  """Returns the `data` of process 0; all processes pass the same length."""
  return multihost_utils.broadcast_one_to_all(
    np.frombuffer(data, np.uint8)
  ).tobytes()


def shared_name() -> str:
  """Returns a new random name, the same in all processes."""
  return _of_the_first(secrets.token_hex(8).encode()).decode()


def _accept(
  server: socket.socket, count: int, token: str
) -> dict[int, socket.socket]:
  """Returns the connections of the others, which must send the token.

  Stops when all are connected, or after `CONNECT` seconds without a new one.
  """
  links: dict[int, socket.socket] = {}
  if count == 1:
    return links
  for link, said in _greetings(server, len(token) + 9, CONNECT):
    index = said[len(token) :].strip()
    known = secrets.compare_digest(said[: len(token)], token.encode())
    if known and index.isdigit() and 0 < int(index) < count:
      links[int(index)] = link
    else:
      link.close()
    if len(links) == count - 1:
      break
  return links


def _greetings(
  server: socket.socket, size: int, patience: float = math.inf
) -> Iterator[tuple[socket.socket, bytes]]:
  """Yields new connections, each with the first `size` bytes it has sent.

  Any program may connect. A connection is closed if it does not send that many
  bytes in time, and the oldest one if too many are waiting. Ends after
  `patience` seconds without a new one.
  """
  waiting: dict[socket.socket, tuple[float, bytes]] = {}
  server.setblocking(False)
  last = time.monotonic()
  try:
    while time.monotonic() < last + patience:
      ready, _, _ = select.select([server, *waiting], [], [], 0.2)
      if server in ready:
        ready.remove(server)
        with contextlib.suppress(OSError):
          link, _ = server.accept()
          link.setblocking(False)
          waiting[link] = time.monotonic(), b''
      for link in ready:
        begun, said = waiting.pop(link)
        try:
          more = link.recv(size - len(said))
        except OSError:
          more = b''
        said += more
        if more and len(said) < size:
          waiting[link] = begun, said
        elif more:
          link.setblocking(True)
          last = time.monotonic()
          yield link, said
        else:
          link.close()
      now = time.monotonic()
      for link, (begun, _) in list(waiting.items()):
        if now > begun + GREETING or len(waiting) > PENDING:
          del waiting[link]
          link.close()
  finally:
    for link in waiting:
      link.close()


def _listen(address: str, port: int) -> socket.socket:
  """Listens at one address of this machine, or with '' at all of them."""
  if not address and socket.has_dualstack_ipv6():
    return socket.create_server(
      ('', port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
    )
  family = socket.AF_INET6 if ':' in address else socket.AF_INET
  return socket.create_server((address, port), family=family, backlog=128)


def _own_address(host: str) -> str:
  """Returns the address of this machine that `host` is; '' if it is not clear.

  To listen only there, not at all addresses, keeps other programs out. A name
  may have another address on other machines: many machines resolve their own
  to 127.0.1.1. The variable BIND overrides all this.
  """
  bound = _host(os.environ.get(BIND, ''))
  if bound:
    return '' if bound in ('0.0.0.0', '::') else bound
  if host == 'localhost':
    return '127.0.0.1'
  try:
    found = {x[4][0] for x in socket.getaddrinfo(host, None)}
  except OSError:
    return ''
  own = [str(address) for address in found if _is_own(str(address))]
  if len(own) != 1 or (_is_loopback(own[0]) and host != own[0]):
    return ''
  return own[0]


def _is_own(address: str) -> bool:
  try:
    _listen(address, 0).close()
  except OSError:
    return False
  return True


def _is_loopback(address: str) -> bool:
  return ipaddress.ip_address(address).is_loopback


def _bind_address(coordinator: str | None) -> str | None:
  """Returns where JAX listens; None: at all addresses, or as BIND says."""
  if not coordinator or BIND in os.environ:
    return None
  address = _own_address(_host(coordinator))
  port = coordinator.rpartition(':')[2]
  if not address:
    return None
  return f'[{address}]:{port}' if ':' in address else f'{address}:{port}'


def _host(address: str) -> str:
  return address.rpartition(':')[0].strip('[]')


def _address() -> str:
  """Returns the address of this machine in its network; sends nothing."""
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
      probe.connect(('192.0.2.1', 9))
    except OSError:
      return socket.gethostname()
    return probe.getsockname()[0]


@contextlib.contextmanager
def _stdout_of_the_first() -> Iterator[None]:
  """Silences stdout in all processes but 0, and what Gloo prints in all."""
  sys.stdout.flush()
  kept = os.dup(1)
  with streams.results(kept) as real, open(os.devnull, 'w') as null:
    os.dup2(null.fileno(), 1)
    try:
      with contextlib.redirect_stdout(real if is_primary() else null):
        yield
    finally:
      real.flush()
      os.dup2(kept, 1)
      os.close(kept)
