"""Shapes in signatures, 'B *shape', as they are written.

Griffe reads a string in an annotation as Python: it would show B * shape.
"""

import ast
from typing import Any

import griffe


class Shapes(griffe.Extension):
  """Reads the annotations of functions again, and leaves strings alone."""

  def on_function_instance(
    self, *, node: Any, func: griffe.Function, **kwargs: Any
  ) -> None:
    if not isinstance(node, ast.FunctionDef) or func.parent is None:
      return

    def read(annotation: Any) -> Any:
      return griffe.safe_get_expression(
        annotation, parent=func.parent, parse_strings=False
      )

    args = node.args
    for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs):
      func.parameters[arg.arg].annotation = read(arg.annotation)
    func.returns = read(node.returns)
