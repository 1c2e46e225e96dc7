"""Several processes: how they find each other, and that they end together.

JAX tells of a lost process by its heartbeats alone, and aborts; an exception in
one process leaves the others waiting for ever. So a connection is held open
between process 0 and each other: one that breaks, or that brings bad news, ends
all of them, in one line and at once.
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
GREETING = 5.0  # that a connection may take to say who it is
LINGER = 5.0  # that a process which ends all waits for the others to leave
SILENT = 64  # connections that have not said it; the oldest gives way
LATER = 30  # that JAX waits for a sign of life longer than we do

# The variable that says to JAX at which HOST:PORT process 0 is to listen.
BIND = 'JAX_COORDINATOR_BIND_ADDRESS'


def is_primary() -> bool:
  """Whether this is the process that speaks and writes for all."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def wait(what: str) -> None:
  """For all processes to come here."""
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
  """Joins the other processes, if there are any; and ends with them.

  What is raised inside, in one of several processes, is told by process 0 (see
  `errors.verdict`) and ends all: it is not raised further.

  Args:
    coordinator: HOST:PORT where process 0 is to be found. If None, a cluster
      that JAX knows is looked for (see `found`).
    count: of processes; 1 looks for none.
    index: of this process.
    start_timeout: seconds until all must have come.
    peer_timeout: seconds without a sign of life until one is given up. A
      process that is killed is noticed at once; this is for one that hangs, and
      for lost machines.
    grace: seconds that a process which fails waits for the others to say why,
      before it ends them itself.
    can_stop: that SIGTERM waits for `stop.requests` to look.

  Raises:
    UserError: a flag is missing or wrong.
  """
  global _links
  check(coordinator, count, index, start_timeout, peer_timeout)
  if count == 1 or not (coordinator or found()):
    yield
    return
  # Else SIGTERM would wait for a loop that asks, and there may be none.
  jax.config.update('jax_enable_preemption_service', can_stop)
  who = 'this process' if index is None else f'process {index} of {count}'
  where = f' at {coordinator}' if coordinator else ''
  with contextlib.ExitStack() as stack:
    with _within(
      start_timeout,
      f'stopped: {who} has not met the others{where} within {start_timeout} '
      'seconds (--start_timeout): start them all, alike but for --process_id; '
      'or name --num_processes=1, if it is alone',
    ):
      try:
        if coordinator and count is not None and index is not None:
          _meet(coordinator, count, index)
        jax.distributed.initialize(
          coordinator,
          count,
          index,
          cluster_detection_method='deactivate' if coordinator else None,
          initialization_timeout=start_timeout + 60,  # else it aborts, in pages
          heartbeat_timeout_seconds=peer_timeout + LATER,  # it aborts too
          coordinator_bind_address=_bind_address(coordinator),
        )
      except (errors.UserError, errors.RunError):
        raise
      except (OSError, RuntimeError, ValueError) as error:
        raise errors.UserError(
          f'{who} cannot join others ({" ".join(str(error).split())}): name '
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
    finally:  # All went well, or all exit with the same code.
      _links.finish()
      jax.distributed.shutdown()


@contextlib.contextmanager
def one_fails_all(*but: type[BaseException]) -> Iterator[None]:
  """What is raised inside, but those, ends all processes; if there are more.

  To be put inside of whatever waits for the others when it is left.
  """
  try:
    yield
  except BaseException as error:
    if not isinstance(error, (SystemExit, *but)):
      end_all(error)
    raise


def end_all(error: BaseException) -> None:
  """Ends all processes because of `error`; if there are more than this one."""
  if _links:
    _links.fail(error)


def only_one(what: str) -> None:
  """Raises UserError if there are several processes."""
  if jax.distributed.is_initialized() and jax.process_count() > 1:
    raise errors.UserError(
      f'{what} is for one process, and here are {jax.process_count()}: start '
      'it alone, with --num_processes=1'
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
  """Whether this is one of several processes that JAX can find by itself.

  Slurm and MPI say how many there are; a Kubernetes pod that it is one of an
  indexed job; GKE which TPU hosts there are. A TPU VM is told by its chips and
  their library: how many hosts there are, JAX asks its metadata server.
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

  What it sets is inherited by every program after it. A shell of `salloc` or
  `srun --pty` is alone, whatever was asked for.

  Raises:
    UserError: if the variables are of another program's tasks.
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
      f'the variables of Slurm here are of {asked} tasks, and this process was '
      'not started as one of them: name --num_processes=1 if it is alone, else '
      '--coordinator, --num_processes and --process_id'
    )
  return True


def _ancestors() -> list[str]:
  """The ids of this process, its parent, and so on; where /proc has them."""
  every, process = [], str(os.getpid())
  with contextlib.suppress(OSError):
    while process != '0':
      every.append(process)
      with open(f'/proc/{process}/stat') as file:
        # Its name, in brackets, may hold anything.
        process = file.read().rpartition(')')[2].split()[1]
  return every


@contextlib.contextmanager
def _within(seconds: float, message: str) -> Iterator[None]:
  """Ends this process if what is inside takes longer."""
  timer = threading.Timer(seconds, leave, (1, message))
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


class _Links:
  """The connections that are held open: of process 0 to all, or to it.

  Over them go lines of JSON: `["here"]`, again and again, as a sign of life;
  `["done"]`, or `["end", code, message]`.
  """

  def __init__(self, host: str, peer_timeout: float, grace: float) -> None:
    self.sockets = _connect(host)
    self.peer_timeout = peer_timeout
    self.grace = grace
    self.done = {index: threading.Event() for index in self.sockets}
    self.last_word = threading.Lock()  # once taken, it is kept
    self.over = threading.Event()
    self.silent = dict.fromkeys(self.sockets, 0.0)  # seconds
    for index in self.sockets:
      threading.Thread(target=self.listen, args=(index,), daemon=True).start()
    threading.Thread(target=self.watch, daemon=True).start()

  def tell(self, *words: Any) -> None:
    for link in self.sockets.values():
      with contextlib.suppress(OSError):
        link.sendall(json.dumps(words).encode() + b'\n')

  def listen(self, index: int) -> None:
    """To the process `index`, for as long as it is there."""
    with contextlib.suppress(OSError):
      for line in self.sockets[index].makefile():
        word, *said = json.loads(line)
        self.silent[index] = 0.0
        if word == 'here':
          continue
        if word == 'done':
          self.done[index].set()
        elif is_primary():
          time.sleep(self.grace)  # We may come to say the same.
          self.end(*said)
        else:
          leave(said[0], '')
    if not self.done[index].is_set():
      self.end(
        1,
        f'stopped: process {index} of {jax.process_count()} went away; it was '
        'killed, or its machine was. Start all again: a run goes on from its '
        'newest checkpoint',
      )

  def watch(self) -> None:
    """Gives signs of life, and ends all when one gives none for too long.

    Pauses are added up, not read from a clock: where all were stopped for an
    hour and go on, none is to blame.
    """
    pause = min(2.0, self.peer_timeout / 5)
    self.tell('here')
    while not self.over.wait(pause):
      self.tell('here')
      for index in self.silent:
        self.silent[index] += pause
        if self.silent[index] > self.peer_timeout:
          self.end(
            1,
            f'stopped: process {index} of {jax.process_count()} has given no '
            f'sign of life for {self.peer_timeout:g} seconds (--peer_timeout): '
            'it hangs, or its machine was lost. Start all again: a run goes on '
            'from its newest checkpoint',
          )

  def fail(self, error: BaseException) -> NoReturn:
    """Ends all processes because of `error`."""
    # A process that went away makes the others raise all sorts of things.
    time.sleep(self.grace)
    code, message = errors.verdict(error)
    if not errors.expected(error):
      traceback.print_exception(error)
    if not is_primary():
      self.tell('end', code, f'{message} (process {jax.process_index()})')
      time.sleep(3 * self.grace)  # Process 0 says it, and bids us end.
    self.end(code, message)

  def end(self, code: int, message: str) -> NoReturn:
    self.last_word.acquire()
    self.tell('end', code, message)
    self.wait_for_the_others_to_leave()
    leave(code, message)

  def wait_for_the_others_to_leave(self) -> None:
    """Until their connections are closed, or for `LINGER` seconds.

    To close a socket with unread bytes resets the connection and drops what is
    still to be sent: the others would not learn why they are to end.
    """
    late = time.monotonic() + LINGER
    for link in self.sockets.values():
      with contextlib.suppress(OSError):
        while (left := late - time.monotonic()) > 0:
          ready, _, _ = select.select([link], [], [], left)
          if ready and not link.recv(4096):
            break

  def finish(self) -> None:
    """Waits until all have come to their end."""
    if not is_primary():
      self.tell('done')
    for done in self.done.values():
      done.wait()
    if is_primary():
      self.tell('done')
    self.over.set()


# Of this process, once it has joined others.
_links: _Links | None = None


def leave(code: int, message: str) -> NoReturn:
  """Ends at once. Python's usual end would wait for the other processes."""
  try:
    # Clears a progress bar. It is not drawn again, as this block never ends.
    with tqdm.tqdm.external_write_mode(sys.stderr):
      if message:
        print(message, file=sys.stderr)
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
  finally:
    os._exit(code)


def _meet(coordinator: str, count: int, index: int) -> None:
  """Compares the flags of all processes, at the address that JAX takes next.

  JAX would abort where their numbers differ, or let the others wait. For who
  comes when all are there, it is as if nobody were.

  Raises:
    UserError: not all were told the same `count`, or two the same `index`.
    RunError: the others have begun without this one.
    OSError: process 0 cannot listen.
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
    if said and late == math.inf:  # a run of before, which may have to end
      late = time.monotonic() + CONNECT
    time.sleep(0.2)
  raise errors.RunError(
    f'at {coordinator} others have begun without process {index} of {count}, '
    'or another program listens: were all told the same --num_processes?'
  )


def _ask(host: str, port: int, hello: bytes) -> str:
  """What process 0 answers, which may take long; '' if nobody does."""
  answer = b''
  with (
    contextlib.suppress(OSError),
    socket.create_connection((host, port), CONNECT) as link,
  ):
    link.settimeout(None)  # until all have come; `_within` has a limit
    link.sendall(hello)
    while more := link.recv(_ANSWER - len(answer)):
      answer += more
  return answer.decode(errors='replace').strip()


# Bytes of what processes say to each other when they meet.
_HELLO = 64
_ANSWER = 256


def _meet_all(server: socket.socket, count: int) -> None:
  """Welcomes all others, or tells all of them what does not fit."""
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
          f'process 0 with --num_processes={count}: start all alike but for '
          '--process_id'
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
  """The number of processes, and which one it is; None from a stranger."""
  try:
    name, total, index = json.loads(said)
  except (ValueError, TypeError, RecursionError):
    return None
  numbers = type(total) is int and type(index) is int
  if name != 'ddpm_jax' or not numbers or not 0 <= index < total:
    return None
  return total, index


def _is_there(link: socket.socket) -> bool:
  """Whether the other side, which says nothing now, has not gone away."""
  try:
    return link.recv(1, socket.MSG_DONTWAIT) != b''
  except BlockingIOError:
    return True
  except OSError:
    return False


def _connect(host: str) -> dict[int, socket.socket]:
  """{process: connection}; process 0 is to be found at `host`."""
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
        '(%s): that one fails or is killed is noticed late, by JAX alone',
        *(me, host, port, error),
      )
      return {}


def _of_the_first(data: bytes) -> bytes:
  """What process 0 gives here; all give as many bytes."""
  return multihost_utils.broadcast_one_to_all(
    np.frombuffer(data, np.uint8)
  ).tobytes()


def shared_name() -> str:
  """A new name, the same in all processes and in no other run."""
  return _of_the_first(secrets.token_hex(8).encode()).decode()


def _accept(
  server: socket.socket, count: int, token: str
) -> dict[int, socket.socket]:
  """Those who know the token, until all have come, or for too long none."""
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
  """Connections, each with the first `size` bytes that came over it.

  Anybody may connect: one that does not say as much in time is closed, and so
  is the oldest of too many. Ends when for `patience` seconds none has come.
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
        if now > begun + GREETING or len(waiting) > SILENT:
          del waiting[link]
          link.close()
  finally:
    for link in waiting:
      link.close()


def _listen(address: str, port: int) -> socket.socket:
  """At one address of this machine, or at all of them, ''."""
  if not address and socket.has_dualstack_ipv6():
    return socket.create_server(
      ('', port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
    )
  family = socket.AF_INET6 if ':' in address else socket.AF_INET
  return socket.create_server((address, port), family=family, backlog=128)


def _own_address(host: str) -> str:
  """The address of this machine that `host` is; '' if that is not clear.

  Listening there, and not at all addresses, keeps strangers out. A name may be
  known to other machines by another address, as that of many a machine is to
  itself 127.0.1.1. The variable BIND has the last word.
  """
  told = _host(os.environ.get(BIND, ''))
  if told:
    return '' if told in ('0.0.0.0', '::') else told
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
  """Where JAX is to listen; None: at all addresses, or as the user told it."""
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
  """Of this machine, as others see it; nothing is sent to find out."""
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
      probe.connect(('192.0.2.1', 9))
    except OSError:
      return socket.gethostname()
    return probe.getsockname()[0]


@contextlib.contextmanager
def _stdout_of_the_first() -> Iterator[None]:
  """Process 0 prints, the others do not; nor does Gloo, past Python."""
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
