"""Pictures: grids, strips and curves, as PNG files."""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterator

import numpy as np
from matplotlib import figure
from matplotlib.backends import backend_agg
from PIL import Image


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A file to write that becomes `path` when it is done: never half a file."""
  part = path.with_name(f'.{path.name}.part')
  yield part
  os.replace(part, path)


def save_png(path: pathlib.Path, image: np.ndarray) -> None:
  """Writes a uint8 (H, W, 1 or 3) image."""
  flat = image[..., 0] if image.shape[-1] == 1 else image
  with whole(path) as part:
    Image.fromarray(flat).save(part, format='PNG')


def save_npz(path: pathlib.Path, images: np.ndarray) -> None:
  """Writes uint8 (N, H, W, C) as `images`."""
  with whole(path) as part, part.open('wb') as file:
    np.savez(file, images=images)


def grid(
  images: np.ndarray, columns: int | None = None, width: int = 800
) -> np.ndarray:
  """Tiles images (N, H, W, C) row by row, with a border, enlarged.

  Small images are repeated pixel by pixel until the whole is about `width`
  pixels wide, so that a person can see them.
  """
  N, H, W, C = images.shape
  columns = columns or math.ceil(math.sqrt(N))
  rows = math.ceil(N / columns)
  border = max(1, H // 16)
  tiles = np.full((rows * columns, H + border, W + border, C), 255, np.uint8)
  tiles[:N, :H, :W] = images
  tiled = tiles.reshape(rows, columns, H + border, W + border, C)
  tiled = tiled.swapaxes(1, 2).reshape(rows * (H + border), -1, C)
  tiled = np.pad(tiled, ((border, 0), (border, 0), (0, 0)), constant_values=255)
  factor = max(1, width // tiled.shape[1])
  return tiled.repeat(factor, axis=0).repeat(factor, axis=1)


def save_curve(
  path: pathlib.Path, x: np.ndarray, y: np.ndarray, xlabel: str, ylabel: str
) -> None:
  """A curve on a logarithmic y axis, with its running median over it."""
  fig = figure.Figure(figsize=(8, 4.5), dpi=100, layout='constrained')
  axes = fig.subplots()
  axes.semilogy(x, y, color='tab:blue', alpha=0.3, linewidth=1)
  window = max(1, len(y) // 50)
  middle = [np.median(y[max(0, i - window) : i + 1]) for i in range(len(y))]
  axes.semilogy(x, middle, color='tab:blue')
  axes.set(xlabel=xlabel, ylabel=ylabel)
  axes.grid(visible=True, which='both', alpha=0.3)
  with whole(path) as part:
    fig.savefig(part, format='png')


def save_scatter(
  path: pathlib.Path, rows: dict[str, list[np.ndarray]], titles: list[str]
) -> None:
  """Point sets (n, 2), a row of them each.

  Args:
    path: a .png; or a .gif, where each column is a frame.
    rows: a name, and as many point sets as there are titles.
    titles: of the columns.
  """
  limit = 1.05 * max(np.abs(x).max() for row in rows.values() for x in row)

  def draw(columns: list[int]) -> figure.Figure:
    fig = figure.Figure(
      figsize=(2.2 * len(columns), 2.3 * len(rows)),
      dpi=80,
      layout='constrained',
    )
    axes = fig.subplots(len(rows), len(columns), squeeze=False)
    for ax_row, (name, row) in zip(axes, rows.items(), strict=True):
      ax_row[0].set_ylabel(name)
      for ax, column in zip(ax_row, columns, strict=True):
        ax.scatter(*row[column].T, s=1, alpha=0.5, linewidths=0)
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[])
        ax.set_aspect('equal')
        ax.set_title(titles[column], fontsize=9)
    return fig

  def pixels(fig: figure.Figure) -> Image.Image:
    canvas = backend_agg.FigureCanvasAgg(fig)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])

  every = list(range(len(titles)))
  with whole(path) as part:
    if path.suffix == '.png':
      pixels(draw(every)).save(part, format='PNG')
      return
    first, *others = (pixels(draw([column])) for column in every)
    first.save(
      part,
      format='GIF',
      save_all=True,
      append_images=others,
      duration=400,  # ms
      loop=0,
    )
