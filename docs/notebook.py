"""docs/tutorial.py as a page of the site, with the pictures that it draws.

This is a hook of MkDocs, which makes the page and runs nothing: the pictures
are in docs/tutorial/. After a change of the tutorial, draw them again:

  python docs/notebook.py
"""

import io
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple
from unittest import mock

DOCS = pathlib.Path(__file__).parent
TUTORIAL = DOCS / 'tutorial.py'
PICTURES = DOCS / 'tutorial'


class Cell(NamedTuple):
  """Of a notebook in the percent format."""

  kind: str  # markdown | code
  title: str  # of a picture: what it shows
  text: str

  @property
  def picture(self) -> str | None:
    """The name of the picture that it draws, if it does."""
    if 'plt.show()' not in self.text:
      return None
    return re.sub('[^a-z0-9]+', '-', self.title.lower()).strip('-') + '.png'


def read(text: str) -> Iterator[Cell]:
  """The cells of a notebook, in order."""
  parts = re.split(r'^# %%(.*)\n', text, flags=re.M)[1:]
  for head, body in zip(parts[::2], parts[1::2], strict=True):
    if '[markdown]' in head:
      text = re.sub(r'^# ?', '', body.strip(), flags=re.M)
      yield Cell('markdown', '', text)
    else:
      yield Cell('code', head.strip(), body.strip())


def to_markdown(text: str) -> str:
  """The notebook as a page that shows the pictures."""
  parts = []
  for cell in read(text):
    if cell.kind == 'markdown':
      parts.append(cell.text)
      continue
    code = re.sub(r'  # noqa.*', '', cell.text)
    parts.append(f'```python\n{code}\n```')
    if cell.picture:
      parts.append(f'![{cell.title}]({PICTURES.name}/{cell.picture})')
  return '\n\n'.join(parts) + '\n'


def on_files(files: Any, config: Any) -> Any:
  """MkDocs calls this with the files of the site; it adds tutorial.md."""
  from mkdocs.structure import files as mkdocs

  content = to_markdown(TUTORIAL.read_text())
  page = mkdocs.File.generated(config, 'tutorial.md', content=content)
  files.append(page)
  return files


def run(text: str, folder: pathlib.Path) -> dict[str, Any]:
  """Runs a notebook: pictures into a folder, and its variables come back."""
  os.environ.setdefault('MPLBACKEND', 'agg')
  from matplotlib import pyplot as plt

  scope: dict[str, Any] = {}
  with mock.patch.object(plt, 'show'):
    for cell in read(text):
      if cell.kind == 'code':
        exec(compile(cell.text, cell.title or 'a cell', 'exec'), scope)
      if cell.picture:
        save(plt.gcf(), folder / cell.picture)
        plt.close('all')
  return scope


def save(figure: Any, path: pathlib.Path) -> None:
  """A PNG of 64 colours, a third of the size."""
  from PIL import Image

  buffer = io.BytesIO()
  figure.savefig(buffer, dpi=100)
  Image.open(buffer).convert('RGB').quantize(64).save(path, optimize=True)


if __name__ == '__main__':
  PICTURES.mkdir(exist_ok=True)
  for old in PICTURES.glob('*.png'):
    old.unlink()
  run(TUTORIAL.read_text(), PICTURES)
