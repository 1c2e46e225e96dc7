"""The codec's file: all of it comes back, or it is said that it does not."""

import collections
import json
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest

from ddpm_jax import errors
from ddpm_jax.compression import file_format
from ddpm_jax.compression import range_coder

SIZES = [1, 2, 3, 4, 6, 8, 12, 16]
STEPS, N, SHAPE = 12, 20, (4, 4, 1)
RULES = file_format.Rules(SIZES, [0.1 * k for k in range(1, STEPS + 1)])
HEADER = {
  'model': 1234567890,
  'images': N,
  'shape': SHAPE,
  'codec': {
    'steps': STEPS,
    'log2_candidates': 14,
    'group_bits': 8.0,
    'batch_size': N,
  },
  'seed': 0,
  'squares': [0.1] * STEPS,
  'software': {'jax': '1.2.3', 'device': 'cpu'},
}


def some_code(seed=0):
  rng = np.random.default_rng(seed)
  size = rng.integers(0, len(SIZES), (STEPS, N))
  chosen = rng.geometric(0.01, (STEPS, N, 16)) - 1
  for s in range(STEPS):
    for n in range(N):
      m = SIZES[size[s, n]]
      chosen[s, n] = chosen[s, n, ::m].repeat(m)[:16]
  return size, chosen, rng.integers(0, 65536, STEPS)


SIZE, CHOSEN, CHECK = some_code()
DATA, BITS, AROUND = file_format.write(HEADER, RULES, SIZE, CHOSEN, CHECK)


def test_it_comes_back():
  read, whole = file_format.read(DATA, RULES)
  assert whole
  size = len(DATA) - read.ends[0]
  assert read.header == json.loads(json.dumps({**HEADER, 'bytes': size}))
  np.testing.assert_array_equal(read.size, SIZE)
  np.testing.assert_array_equal(read.chosen, CHOSEN)
  assert read.checks == {s: CHECK[s - 1] for s in read.checks}
  assert read.ends[STEPS] == len(DATA)


def test_its_bits_are_counted():
  coded = 8 * (len(DATA) - AROUND)
  # A chunk ends with a whole byte, and at most a byte more.
  chunks = len(file_format.read(DATA, RULES)[0].checks)
  assert chunks > 4
  assert 0 <= coded - BITS.sum() < 16 * chunks


def same_as_far_as_it_goes(read):
  s = len(read.size)
  np.testing.assert_array_equal(read.size, SIZE[:s])
  np.testing.assert_array_equal(read.chosen, CHOSEN[:s])
  assert all(CHECK[s - 1] == check for s, check in read.checks.items())


@pytest.mark.parametrize('cut', range(0, len(DATA), 101))
def test_any_first_part_is_worth_its_whole_chunks(cut):
  _, end = file_format.read_header(DATA)
  if cut < end:
    with pytest.raises(errors.UserError):
      file_format.read(DATA[:cut], RULES)
    return
  read, whole = file_format.read(DATA[:cut], RULES)
  assert not whole
  every, _ = file_format.read(DATA, RULES)
  assert len(read.size) == max(s for s, e in every.ends.items() if e <= cut)
  same_as_far_as_it_goes(read)


@pytest.mark.parametrize('seed', range(10))
def test_a_hundred_flips_and_cuts_give_no_wrong_code(seed):
  rng = np.random.default_rng(seed)
  refused, one_line = 0, True
  for _ in range(100):
    data = bytearray(DATA)
    for _ in range(rng.integers(0, 3)):
      data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    data = bytes(data[: rng.integers(len(data) + 1)])
    try:
      read, whole = file_format.read(data, RULES)
    except errors.UserError as e:
      refused += 1
      one_line &= '\n' not in str(e)
      continue
    same_as_far_as_it_goes(read)
    assert whole == (data == DATA)
  assert 20 < refused < 100
  assert one_line


def test_a_chunk_cannot_be_missing_or_moved():
  every, _ = file_format.read(DATA, RULES)
  a, b, c, *_ = every.ends.values()
  for data in (
    DATA[:a] + DATA[b:],
    DATA[:a] + DATA[b:c] + DATA[a:b] + DATA[c:],
    DATA + DATA[a:b],
  ):
    with pytest.raises(errors.UserError, match='damaged'):
      file_format.read(data, RULES)


def test_damage_names_the_part_that_is_whole():
  every, _ = file_format.read(DATA, RULES)
  _, b, c, *_ = every.ends.values()
  data = bytearray(DATA)
  data[(b + c) // 2] ^= 1
  with pytest.raises(errors.UserError, match=f'--bytes={b} uses'):
    file_format.read(bytes(data), RULES)
  same_as_far_as_it_goes(file_format.read(bytes(data[:b]), RULES)[0])


@pytest.mark.parametrize(
  ('data', 'what'),
  [
    (b'', 'was not written by'),
    (b'\x89PNG\r\n\x1a\n' * 40, 'was not written by'),
    (DATA[:8], 'header is truncated'),
    (DATA[:6] + b'\x07' + DATA[7:], 'version 7'),
    (DATA + b'more', 'damaged'),
  ],
)
def test_another_file_is_refused(data, what):
  with pytest.raises(errors.UserError, match=what):
    file_format.read(data, RULES)


@pytest.mark.parametrize('p', [0.5, 0.1, 0.999])
def test_bits_take_as_much_as_they_tell(p):
  rng = np.random.default_rng(0)
  told = (rng.random(20_000) < p).astype(int).tolist()
  encoder = range_coder.Encoder(range_coder.Odds())
  for bit in told:
    encoder.bit('a', bit)
  data = encoder.finish()
  ones = np.mean(told)
  entropy = -(ones * np.log2(ones) + (1 - ones) * np.log2(1 - ones))
  # Learning the odds takes ½ log2 n bits, the end a byte, odds of 16 bits a
  # hundredth.
  assert 8 * len(data) < 1.01 * entropy * len(told) + 20
  decoder = range_coder.Decoder(range_coder.Odds(), data)
  assert [decoder.bit('a', None) for _ in told] == told


def test_numbers_of_any_size_come_back():
  rng = np.random.default_rng(0)
  told = [0, 1, 2, 2**24, *(2 ** rng.uniform(0, 30, 300)).astype(int).tolist()]
  encoder = range_coder.Encoder(range_coder.Odds())
  for n in told:
    range_coder.whole(encoder, ('a',), n)
  decoder = range_coder.Decoder(range_coder.Odds(), encoder.finish())
  assert [range_coder.whole(decoder, ('a',), None) for _ in told] == told


def test_noise_is_not_read_for_ever():
  """A CRC lets nothing through but what was written; this is without one."""
  decoder = range_coder.Decoder(range_coder.Odds(), b'')
  with pytest.raises(ValueError, match=r'unary code|ends too early'):
    collections.deque(
      range_coder.whole(decoder, ('a',), None) for _ in range(99)
    )


def test_a_header_is_small():
  assert AROUND < 300
  assert zlib.decompress(DATA[9 : 9 + int.from_bytes(DATA[7:9], 'big')])


def packed(header):
  """The bytes of a file with that header, and nothing after it."""
  text = zlib.compress(header, 9)
  front = file_format.MAGIC + struct.pack('>BH', file_format.VERSION, len(text))
  return front + text + struct.pack('>I', zlib.crc32(front + text))


WHOLE = {**file_format.read_header(DATA)[0]}
DEEP = b'[' * 10_000 + b']' * 10_000
ABSURD = [
  *(None, 'x', '', -1, 0, 1.5, True, 10**9, 10**30, 10**400, [], {}, [[]]),
  *(float('nan'), float('inf'), [1] * 10_000, {'a': {}}, 'x' * 100_000),
]


def refused_quickly(data):
  """Whether a file is refused; in one short line, soon, with little memory."""
  tracemalloc.start()
  begun, told = time.monotonic(), ''
  try:
    file_format.read(data, RULES)
  except errors.UserError as e:
    told = str(e)
  seconds = time.monotonic() - begun
  _, most = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert seconds < 2
  assert most < 100 * 2**20
  assert '\n' not in told
  assert len(told) < 300
  return bool(told)


def test_a_header_alone_is_read():
  assert not refused_quickly(packed(json.dumps(WHOLE).encode()))


@pytest.mark.parametrize('field', WHOLE)
def test_a_field_that_is_absurd_is_refused(field):
  good = {'model': (0, -1, 10**9, 10**30, 10**400), 'seed': (0, 10**9)}
  good |= {'bytes': (0, 10**9), 'software': ({},)}
  for value in ABSURD:
    data = packed(json.dumps({**WHOLE, field: value}).encode())
    fine = type(value) is not bool and value in good.get(field, ())
    assert refused_quickly(data) != fine, value
  less = {key: x for key, x in WHOLE.items() if key != field}
  with pytest.raises(errors.UserError, match=f'{field} is missing'):
    file_format.read_header(packed(json.dumps(less).encode()))
  deep = json.dumps({**WHOLE, field: 0}).encode()
  assert refused_quickly(packed(deep.replace(b'0', DEEP, 1)))


@pytest.mark.parametrize('field', WHOLE['codec'])
def test_so_is_a_field_of_the_codec(field):
  for value in [*ABSURD, 25, 10**6]:
    if field == 'group_bits' and value == 1.5:
      continue
    codec = {**WHOLE['codec'], field: value}
    if codec == WHOLE['codec']:
      continue
    data = packed(json.dumps({**WHOLE, 'codec': codec}).encode())
    assert refused_quickly(data), value


def test_a_header_is_bounded_whatever_it_unpacks_to():
  assert refused_quickly(packed(b' ' * 10**7))
  assert refused_quickly(packed(b'\xff'))
  assert refused_quickly(packed(b'[]'))
  many = json.dumps({**WHOLE, 'images': 10**9}).encode()
  with pytest.raises(errors.UserError, match='images=1000000000 in'):
    file_format.read_header(packed(many))


def test_more_steps_than_the_header_tells_of_are_not_read():
  """A bit that is expected costs nearly nothing: they could go on for long."""
  header, end = file_format.read_header(DATA)
  front = DATA[:end]
  chunk = b'\xff\xff\xff\x7f' + b'\0' + b'\0\0'
  crc = zlib.crc32(chunk, int.from_bytes(front[-4:], 'big'))
  assert header['bytes'] > len(chunk) + 4
  with pytest.raises(errors.UserError, match=f'damaged after byte {end}'):
    file_format.read(front + chunk + struct.pack('>I', crc), RULES)


def test_a_bit_that_was_never_seen_can_be_told():
  """Else the coder shifts zeros for ever, once 32768 others were seen."""
  odds = range_coder.Odds()
  odds.counts['a'] = [40_000, 0]
  encoder = range_coder.Encoder(odds)
  encoder.bit('a', 1)
  odds = range_coder.Odds()
  odds.counts['a'] = [40_000, 0]
  assert range_coder.Decoder(odds, encoder.finish()).bit('a', None) == 1


def test_what_stands_for_no_code_is_damaged(monkeypatch):
  """Should a CRC let it through: numbers that nothing was written as."""
  monkeypatch.setattr(
    range_coder, 'unary', lambda coder, context, n: 63 if n is None else n
  )
  with pytest.raises(errors.UserError, match='damaged after byte'):
    file_format.read(DATA, RULES)


def test_bytes_after_the_end_are_damage():
  with pytest.raises(errors.UserError, match='damaged'):
    file_format.read(DATA + b'\0' * 20, RULES)


def test_a_number_of_ones_without_an_end_is_none():
  class Ones:
    def bit(self, context, bit):
      return 1

  with pytest.raises(ValueError, match='unary code is longer'):
    range_coder.unary(Ones(), ('a',), None)
