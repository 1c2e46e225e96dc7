"""What the pages of the API show otherwise than Griffe reads it.

The shape 'B *shape' in a signature is a string, which Griffe would read as
Python and show as B * shape. Lines of a docstring with >>> are code, which
Markdown would read as a quotation.
"""

import ast
import re
from typing import Any

import griffe

PROMPTED = re.compile(r'(?:^(?:>>>|\.\.\.).*(?:\n|$))+', re.M)


class Extension(griffe.Extension):
  """Reads annotations and docstrings again."""

  def on_function_instance(
    self, *, node: Any, func: griffe.Function, **kwargs: Any
  ) -> None:
    """Leaves strings in annotations alone."""
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

  def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    """Makes a block of code of lines with >>>."""
    if obj.docstring:
      obj.docstring.value = PROMPTED.sub(_block, obj.docstring.value)


def _block(match: re.Match[str]) -> str:
  code = re.sub(r'^(>>>|\.\.\.) ?', '', match[0].rstrip('\n'), flags=re.M)
  return f'```python\n{code}\n```\n'
