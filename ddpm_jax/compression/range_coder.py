"""An adaptive binary range coder (Martin 1979; Krichevsky & Trofimov 1981).

`Encoder` and `Decoder` have the same methods, which take the value to be told
and return it; a decoder is given None. So one function serves both ways.
"""

import collections
import math

TOP, ALL = 2**24, 2**32 - 1


class Odds:
  """How likely a bit of each context is to be 1, by those before it."""

  def __init__(self) -> None:
    self.counts: dict = collections.defaultdict(lambda: [0, 0])

  def of_16_bits(self, context: object) -> int:
    """In 1..65535, of 65536."""
    zeros, ones = self.counts[context]
    odds = (2 * ones + 1) * 65536 // (2 * (zeros + ones + 1))
    return min(65535, max(1, odds))

  def see(self, context: object, bit: int) -> None:
    self.counts[context][bit] += 1


class Encoder:
  """Bits of contexts -> bytes. `odds` outlive it, a chunk after the other."""

  def __init__(self, odds: Odds):
    self.odds, self.low, self.range, self.out = odds, 0, ALL, bytearray()

  def bit(self, context: object, bit: int | None) -> int:
    assert bit is not None
    odds = 32768 if context is None else self.odds.of_16_bits(context)
    split = (self.range >> 16) * odds
    if bit:
      self.range = split
    else:
      self.low, self.range = self.low + split, self.range - split
    while self.range < TOP:
      self._shift()
    if context is not None:
      self.odds.see(context, bit)
    return bit

  def _shift(self) -> None:
    self._carry()
    self.out.append(self.low >> 24)
    self.low, self.range = self.low << 8 & ALL, self.range << 8

  def _carry(self) -> None:
    at = len(self.out)
    while self.low > ALL:
      at -= 1
      self.low -= 0 if self.out[at] == 255 else ALL + 1
      self.out[at] = (self.out[at] + 1) % 256

  def length(self) -> float:
    """In bits, so far."""
    return 8 * len(self.out) + 32 - math.log2(self.range)

  def finish(self) -> bytes:
    """The fewest bytes that tell all; the decoder reads zeros after them."""
    for n in range(5):
      unit = 2 ** (32 - 8 * n)
      value = -(-self.low // unit) * unit
      if value < self.low + self.range:
        break
    self.low = value
    self._carry()
    return bytes(self.out) + self.low.to_bytes(4, 'big')[:n]


class Decoder:
  """Bytes -> the bits."""

  def __init__(self, odds: Odds, data: bytes):
    self.odds, self.range, self.data = odds, ALL, data
    self.value, self.at = 0, 0
    for _ in range(4):
      self._next()

  def bit(self, context: object, bit: int | None) -> int:
    del bit
    odds = 32768 if context is None else self.odds.of_16_bits(context)
    split = (self.range >> 16) * odds
    told = int(self.value < split)
    if told:
      self.range = split
    else:
      self.value, self.range = self.value - split, self.range - split
    while self.range < TOP:
      self._next()
      self.range <<= 8
    if context is not None:
      self.odds.see(context, told)
    return told

  def _next(self) -> None:
    # Zeros follow, for as much as is read ahead.
    if self.at > len(self.data) + 4:
      raise ValueError('more is told than there are bytes')
    byte = self.data[self.at] if self.at < len(self.data) else 0
    self.value, self.at = self.value << 8 | byte, self.at + 1


def unary(coder: Encoder | Decoder, context: tuple, n: int | None) -> int:
  """n in 0..63 as so many ones and a zero.

  Raises:
    ValueError: if a decoder finds more.
  """
  for i in range(64):
    if not coder.bit((*context, i), None if n is None else int(i < n)):
      return i
  raise ValueError('no number is as long as this one')


def whole(coder: Encoder | Decoder, context: tuple, n: int | None) -> int:
  """n in 0, 1, 2, ...: how many bits n + 1 has, adaptively, then its bits."""
  length = None if n is None else (n + 1).bit_length() - 1
  length = unary(coder, context, length)
  told = 1
  for i in reversed(range(length)):
    # The first bits of numbers with a long tail are not even.
    of = (*context, length, told) if told < 4 else None
    told = told << 1 | coder.bit(of, None if n is None else (n + 1) >> i & 1)
  return told - 1
