"""Plots with Matplotlib: curves, scatter plots, labelled grids of images."""

import logging
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple

import numpy as np

from ddpm_jax.storage import images
from ddpm_jax.storage import paths

if TYPE_CHECKING:
  from matplotlib.figure import Figure


def new_figure(**options: Any) -> 'Figure':
  """Returns an empty Matplotlib figure.

  Matplotlib is imported here, because that is slow. On import it reads
  MPLBACKEND, which may name a backend of a notebook that is not installed here,
  and logs warnings if it cannot write a cache. Both are suppressed.
  """
  backend = os.environ.pop('MPLBACKEND', None)
  logging.getLogger('matplotlib').setLevel(logging.ERROR)
  from matplotlib import figure

  if backend is not None:
    os.environ['MPLBACKEND'] = backend
  return figure.Figure(**options)


def render(fig: 'Figure') -> np.ndarray:
  """Renders a figure into uint8 pixels (H, W, 3)."""
  from matplotlib.backends import backend_agg

  canvas = backend_agg.FigureCanvasAgg(fig)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3]


def running_median(y: np.ndarray, half: int) -> np.ndarray:
  """The median over a window of `half` values to each side.

  The window shrinks at the ends but stays symmetric, so that the median of a
  slope has no lag.
  """
  n = len(y)
  sides = [min(half, i, n - 1 - i) for i in range(n)]
  return np.array(
    [np.median(y[i - h : i + h + 1]) for i, h in enumerate(sides)]
  )


def save_curve(
  path: pathlib.Path, x: np.ndarray, y: np.ndarray, xlabel: str, ylabel: str
) -> None:
  """Saves a curve and its running median, on a logarithmic y axis."""
  fig = new_figure(figsize=(8, 4.5), dpi=100, layout='constrained')
  axes = fig.subplots()
  axes.semilogy(x, y, color='tab:blue', alpha=0.3, linewidth=1)
  middle = running_median(y, max(1, len(y) // 100))
  axes.semilogy(x, middle, color='tab:blue')
  axes.set(xlabel=xlabel, ylabel=ylabel)
  axes.grid(visible=True, which='both', alpha=0.3)
  with paths.atomic_write(path) as part:
    fig.savefig(part, format='png')


def scatter_limit(data: Sequence[np.ndarray]) -> float:
  """The axis limit for point sets (n, 2).

  1.25 times the limit that contains 99.5% of each set, so that a few outliers
  do not make the others small.
  """
  return 1.25 * max(float(np.quantile(np.abs(x).max(1), 0.995)) for x in data)


def save_scatter(
  path: pathlib.Path,
  rows: dict[str, list[np.ndarray]],
  titles: list[str],
  data: Sequence[np.ndarray],
) -> None:
  """Saves rows of scatter plots of point sets (n, 2).

  Args:
    path: A .png, or a .gif in which each column is a frame.
    rows: Point sets by name of the row, one for each title.
    titles: Titles of the columns.
    data: The sets that determine the scale. Outside, points are only counted.
  """
  limit = scatter_limit(data)

  def draw(columns: list[int]) -> 'Figure':
    fig = new_figure(
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
        outside = np.count_nonzero(np.abs(row[column]).max(1) > limit)
        if outside:
          ax.set_xlabel(f'{outside} outside', fontsize=7)
    return fig

  every = list(range(len(titles)))
  if path.suffix == '.png':
    images.save_png(path, render(draw(every)))
  else:
    images.save_gif(path, [render(draw([column])) for column in every], 400)


def labelled(
  tiles: np.ndarray,
  titles: Sequence[str] = (),
  labels: Sequence[str] = (),
  head: str = '',
) -> np.ndarray:
  """Draws a grid of images with text, uint8 (height, width, 3).

  Args:
    tiles: uint8 (R, K, H, W, C), images in R rows and K columns.
    titles: K titles of columns, or none.
    labels: R labels of rows, or none.
    head: Title of the grid.
  """
  R, K = tiles.shape[:2]
  flat = tiles.reshape(-1, *tiles.shape[2:])
  pixels = images.grid(flat, columns=K, width=min(1200, 150 * K))
  height, width = pixels.shape[:2]
  em = 0.62  # width of a letter / font size; a point is 100/72 pixels
  longest = max([len(title) for title in titles], default=1)
  size = min(10, width / K * 72 / 100 / (longest + 1) / em)
  left = 20 + int(max([len(x) for x in labels], default=0) * 10 * em * 100 / 72)
  top = 12 + 16 * bool(titles) + 20 * bool(head)
  full = np.array([left + width + 12, top + height + 12])
  fig = new_figure(figsize=tuple(full / 100), dpi=100)
  x, y = np.array([left, 12]) / full
  axes = fig.add_axes((x, y, width / full[0], height / full[1]))
  # The axes have exactly the size of the grid, so that no pixels are blended.
  axes.imshow(
    np.broadcast_to(pixels, (height, width, 3)),
    extent=(0, K, R, 0),
    aspect='auto',
    interpolation='nearest',
  )
  axes.spines[:].set_visible(False)
  axes.tick_params(length=0, pad=3, labeltop=True, labelbottom=False)
  axes.set_xticks(np.arange(len(titles)) + 0.5, titles, fontsize=size)
  axes.set_yticks(np.arange(len(labels)) + 0.5, labels, fontsize=10)
  fig.text(x, 1 - 6 / full[1], head, va='top', fontsize=11)
  return render(fig)


def stack(parts: Sequence[np.ndarray]) -> np.ndarray:
  """Stacks images (h, w, 3) vertically, centered on white."""
  width = max(part.shape[1] for part in parts)
  wide = []
  for part in parts:
    left, odd = divmod(width - part.shape[1], 2)
    margin = ((0, 0), (left, left + odd), (0, 0))
    wide.append(np.pad(part, margin, constant_values=255))
  return np.concatenate(wide)


class Panel(NamedTuple):
  """Curves that share their axes."""

  xlabel: str
  ylabel: str
  curves: dict[str, tuple[np.ndarray, np.ndarray]]  # name: (x, y)
  bottom: float = 0.0  # of the y axis, which is logarithmic unless this is 0
  log_x: bool = False


def plot(panels: Sequence[Panel], bold: str = '') -> np.ndarray:
  """Draws panels side by side, (height, width, 3); emphasizes curve `bold`."""
  fig = new_figure(
    figsize=(12, 8 / len(panels) + 1), dpi=100, layout='constrained'
  )
  for axes, panel in zip(fig.subplots(1, len(panels)), panels, strict=True):
    for name, (x, y) in panel.curves.items():
      width = 3.5 if bold and name == bold else 1.2
      axes.plot(x, y, label=name, linewidth=width)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    axes.set_xscale('log' if panel.log_x else 'linear')
    axes.set_yscale('log' if panel.bottom else 'linear')
    axes.margins(y=0.02)
    axes.set_ylim(bottom=panel.bottom)
    axes.grid(visible=True, alpha=0.3)
    if len(panel.curves) > 1 and panel is panels[0]:
      axes.legend(fontsize=8)
  return render(fig)
