"""Pushes a folder to the Hugging Face Hub as a model."""

import http.client
import pathlib
import re
import shlex
import ssl
import urllib.error
import urllib.request
from typing import Any

from ddpm_jax import errors

SCHEME = 'hf://'
INSTALL = "pip install -e '.[hub]'"
TIMEOUT = 10  # seconds, to see that the Hub answers
# The rules of the Hub. Each part begins and ends with a letter or digit.
_PART = r'\w(?:[\w.-]*\w)?'
_NAME = re.compile(rf'{_PART}/{_PART}', re.ASCII)
_ODD = re.compile(r'--|\.\.|\.git$|\.ipynb$')
LONGEST = 96


def parse(text: str) -> str:
  """Returns USER/NAME of hf://USER/NAME.

  Raises:
    UserError: It is not a name that the Hub accepts.
  """
  name = text.removeprefix(SCHEME)
  if (
    not text.startswith(SCHEME)
    or not _NAME.fullmatch(name)
    or _ODD.search(name)
    or len(name) > LONGEST
  ):
    raise errors.UserError(
      f'{errors.short(repr(text))} is not a model of the Hugging Face Hub: '
      f'write {SCHEME}USER/NAME, of letters and digits with . - _ between them'
    )
  return name


def staging(text: str) -> pathlib.Path:
  """Returns the folder that is written before the upload to hf://USER/NAME."""
  return pathlib.Path('runs') / f'{text.rpartition("/")[2]}_diffusers'


def load(name: str) -> Any:
  """Imports huggingface_hub.

  Raises:
    UserError: It is not installed.
  """
  return errors.optional(
    'huggingface_hub',
    what=f'--output={SCHEME}{name}',
    install=f'{INSTALL}, or name a folder as --output',
  )


def upload_command(name: str, folder: pathlib.Path) -> str:
  """Returns the shell command that uploads the folder."""
  return f'hf upload {name} {shlex.quote(str(folder))}'


def push(folder: pathlib.Path, name: str, message: str) -> str:
  """Uploads a folder as the model USER/NAME, which is created if need be.

  The Hub must answer within `TIMEOUT` seconds: its client would wait longer.

  Args:
    folder: What to upload.
    name: USER/NAME.
    message: Message of the commit.

  Returns:
    The URL of the model.

  Raises:
    RunError: It was not uploaded; says why, and the command that does it.
  """
  hub = load(name)
  api = hub.HfApi()
  command = upload_command(name, folder)
  login = f'hf auth login && {command}'
  if not hub.get_token():
    raise _failed('there is no token of the Hugging Face Hub', folder, login)
  try:
    # With HF_HUB_OFFLINE=1 the client refuses by itself.
    if not hub.constants.HF_HUB_OFFLINE:
      _reach(api.endpoint)
    api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
  except Exception as e:  # No network, no right to write, no such user, ...
    status = getattr(getattr(e, 'response', None), 'status_code', None)
    reason = f'{type(e).__name__}: {errors.short(str(e), 200)}'
    raise _failed(
      f'{api.endpoint} did not take the model ({reason})',
      *(folder, login if status in (401, 403) else command),
    ) from e
  return f'{api.endpoint}/{name}'


def _failed(what: str, folder: pathlib.Path, command: str) -> errors.RunError:
  return errors.RunError(
    f'{what}: the model and its card are in {folder}; to upload them: {command}'
  )


def _reach(endpoint: str) -> None:
  """Raises an OSError if nothing answers there in time."""
  request = urllib.request.Request(endpoint, method='HEAD')
  try:
    # Not urlopen: it keeps the proxies of its first call in this process.
    with urllib.request.build_opener().open(request, timeout=TIMEOUT):
      pass
  except urllib.error.HTTPError:
    pass  # It answers.
  except urllib.error.URLError as e:
    # The client of the Hub brings its own certificates.
    if not isinstance(e.reason, ssl.SSLError):
      raise
  except http.client.HTTPException as e:
    raise ConnectionError(f'{type(e).__name__} from {endpoint}') from e
