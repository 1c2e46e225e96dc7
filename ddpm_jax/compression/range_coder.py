"""An adaptive binary range coder (Martin 1979; Krichevsky & Trofimov 1981).

`Encoder.bit` and `Decoder.bit` have the same signature: they take the bit, or
None for a decoder, and return it. So one function both encodes and decodes.
"""

import collections
import math

TOP, ALL = 2**24, 2**32 - 1


class Odds:
  """Estimates the probability of a 1 in each context from earlier bits."""

  def __init__(self) -> None:
    self.counts: dict = collections.defaultdict(lambda: [0, 0])

  def of_16_bits(self, context: object) -> int:
    """The probability of a 1 in units of 2^-16, in 1..65535."""
    zeros, ones = self.counts[context]
    odds = (2 * ones + 1) * 65536 // (2 * (zeros + ones + 1))
    return min(65535, max(1, odds))

  def see(self, context: object, bit: int) -> None:
    self.counts[context][bit] += 1


class Encoder:
  """Encodes bits into bytes. `odds` may be shared by successive encoders."""

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
    """Length of the code so far, in bits."""
    return 8 * len(self.out) + 32 - math.log2(self.range)

  def finish(self) -> bytes:
    """Returns the shortest code; the decoder reads zeros after its end."""
    for n in range(5):
      unit = 2 ** (32 - 8 * n)
      value = -(-self.low // unit) * unit
      if value < self.low + self.range:
        break
    self.low = value
    self._carry()
    return bytes(self.out) + self.low.to_bytes(4, 'big')[:n]


class Decoder:
  """Decodes the bytes of an `Encoder`."""

  def __init__(self, odds: Odds, data: bytes):
    self.odds, self.range, self.data = odds, ALL, data
    self.value, self.at = 0, 0
    for _ in range(4):
      self._next()

  def bit(self, context: object, bit: int | None) -> int:
    del bit
    odds = 32768 if context is None else self.odds.of_16_bits(context)
    split = (self.range >> 16) * odds
    decoded = int(self.value < split)
    if decoded:
      self.range = split
    else:
      self.value, self.range = self.value - split, self.range - split
    while self.range < TOP:
      self._next()
      self.range <<= 8
    if context is not None:
      self.odds.see(context, decoded)
    return decoded

  def _next(self) -> None:
    # The decoder reads up to four zero bytes ahead of the code's end.
    if self.at > len(self.data) + 4:
      raise ValueError('the code ends too early')
    byte = self.data[self.at] if self.at < len(self.data) else 0
    self.value, self.at = self.value << 8 | byte, self.at + 1


def unary(coder: Encoder | Decoder, context: tuple, n: int | None) -> int:
  """Codes n in 0..63 as n ones and a zero.

  Raises:
    ValueError: If a decoder reads 64 ones.
  """
  for i in range(64):
    if not coder.bit((*context, i), None if n is None else int(i < n)):
      return i
  raise ValueError('a unary code is longer than 63')


def whole(coder: Encoder | Decoder, context: tuple, n: int | None) -> int:
  """Codes n >= 0: the bit length of n + 1 in unary, then its lower bits."""
  length = None if n is None else (n + 1).bit_length() - 1
  length = unary(coder, context, length)
  prefix = 1
  for i in reversed(range(length)):
    # In a long-tailed distribution the leading bits are not uniform.
    of = (*context, length, prefix) if prefix < 4 else None
    bit = coder.bit(of, None if n is None else (n + 1) >> i & 1)
    prefix = prefix << 1 | bit
  return prefix - 1
