"""A module's namespace is the registry: names in a recipe are its functions."""

import inspect
from collections.abc import Callable
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


def call(function: Callable, section: Mapping[str, Any], *args: Any) -> Any:
  """Calls `function` with the keys of a section that it has arguments for.

  Raises:
    UserError: for a value that `function` refuses.
  """
  names = inspect.signature(function).parameters
  try:
    return function(*args, **{k: v for k, v in section.items() if k in names})
  except ValueError as e:
    raise errors.UserError(str(e)) from e
