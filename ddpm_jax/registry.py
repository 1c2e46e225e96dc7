"""A module's namespace is the registry: names in a recipe are its functions."""

import inspect
import re
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ddpm_jax import errors


def known(
  module: ModuleType, argument: str | None = None
) -> dict[str, Callable]:
  """The functions of a module, by name; those with an argument of that name.

  An argument is what makes a function a schedule or a sampler, not a helper.
  """
  return {
    name: f
    for name, f in inspect.getmembers(module, inspect.isfunction)
    if f.__module__ == module.__name__
    and not name.startswith('_')
    and (not argument or argument in inspect.signature(f).parameters)
  }


def named(
  module: ModuleType, name: str, argument: str | None, what: str
) -> Callable:
  """The function `name` among the `known` of a module.

  Raises:
    UserError: if there is none, naming those there are.
  """
  there = known(module, argument)
  if name not in there:
    raise errors.unknown(what, name, there)
  return there[name]


def call(
  function: Callable, section: Mapping[str, Any], *args: Any, of: str
) -> Any:
  """Calls `function` with the keys of a section that it has arguments for.

  `of` is the name of the section in the recipe, such as 'sampler'.

  Raises:
    UserError: for a value that `function` refuses, naming its keys.
  """
  names = inspect.signature(function).parameters
  passed = {k: v for k, v in section.items() if k in names}
  try:
    return function(*args, **passed)
  except errors.UserError:
    raise
  except ValueError as e:
    raise errors.UserError(_with_keys(str(e), passed, of)) from e


def _with_keys(message: str, passed: Mapping[str, Any], section: str) -> str:
  """A refusal with the keys it is about: those that it names, or else all."""
  if 'config.' in message:
    return message
  keys = {k: v for k, v in passed.items() if not callable(v)}
  about = [k for k in keys if re.search(rf'\b{k}\b', message)] or list(keys)
  said = ', '.join(f'config.{section}.{k}={keys[k]}' for k in about)
  return f'{said or f"config.{section}"}: {message}'


def unused(
  members: Mapping[str, Callable], chosen: str, section: Iterable[str]
) -> list[str]:
  """The keys of a section that other members take, and the chosen does not."""
  taken = {name: inspect.signature(f).parameters for name, f in members.items()}
  others = {key for parameters in taken.values() for key in parameters}
  return [k for k in section if k in others and k not in taken[chosen]]
