"""What a compiled program says of itself, held to what it must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ddpm_jax.planning import hlo

pytestmark = pytest.mark.eight_devices

N = 8
ROWS, COLUMNS = 64, 32
WHOLE = ROWS * COLUMNS * 4  # bytes of float32


@pytest.fixture(scope='module')
def mesh():
  return jax.make_mesh((N,), ('x',), axis_types=(AxisType.Auto,))


ROW = P('x')
ALL = P()


def of(f, mesh, out=ALL, *, into=ROW, **options):
  x = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)
  return hlo.of(
    jax.jit(
      f,
      in_shardings=NamedSharding(mesh, into),
      out_shardings=NamedSharding(mesh, out),
      **options,
    )
    .lower(x)
    .compile()
  )


def test_a_matrix_product_is_2mnk_and_its_three_matrices():
  n = 128
  x = jax.ShapeDtypeStruct((n, n), jnp.float32)
  a = hlo.of(jax.jit(jnp.matmul).lower(x, x).compile())
  assert a.flops == 2 * n**3
  assert a.arguments == 2 * n * n * 4
  assert a.outputs == n * n * 4
  assert a.bytes == 3 * n * n * 4
  assert a.donated == 0
  assert a.peak >= a.arguments + a.outputs + a.temporaries
  assert a.collectives == {}
  assert a.host_transfers == ()


def test_memory_is_that_of_one_device(mesh):
  a = of(lambda x: x + 1, mesh, P('x'))
  assert a.arguments == a.outputs == WHOLE / N


def test_a_donated_argument_takes_no_second_place(mesh):
  kept = of(lambda x: x + 1, mesh, P('x'))
  given = of(lambda x: x + 1, mesh, P('x'), donate_argnums=0)
  assert (kept.donated, given.donated) == (0, WHOLE / N)
  assert kept.peak - given.peak == WHOLE / N


def gathered(x):
  return x * 2


def summed(x):
  return x.sum(0)


def rolled(x):
  return jnp.roll(x, 1, axis=0)


def turned(x):
  return x * 2


@pytest.mark.parametrize(
  ('f', 'out', 'kind', 'size'),
  [
    (summed, P(), 'all-reduce', COLUMNS * 4),
    (gathered, P(), 'all-gather', WHOLE),
    (rolled, P('x'), 'collective-permute', COLUMNS * 4),
    (turned, P(None, 'x'), 'all-to-all', WHOLE / N),
  ],
)
def test_collectives_are_those_the_shardings_ask_for(mesh, f, out, kind, size):
  (found,) = of(f, mesh, out).collectives.items()
  assert found == (kind, hlo.Collective(1, size, 0, 0))


def test_a_reduce_scatter_counts_what_goes_in(mesh):
  def scattered(x):
    return jax.lax.psum_scatter(x, 'x', tiled=True)

  f = jax.shard_map(scattered, mesh=mesh, in_specs=P(), out_specs=P('x'))
  (found,) = of(f, mesh, P('x'), into=P()).collectives.items()
  assert found == ('reduce-scatter', hlo.Collective(1, WHOLE, 0, 0))


def test_a_collective_in_a_loop_is_said_to_be_there(mesh):
  """Also in a function that the body of the loop calls."""

  def f(x):
    def body(x, _):
      whole = jax.lax.with_sharding_constraint(
        x.sum(0), NamedSharding(mesh, P())
      )
      more = jax.lax.cond(whole[0] > 0, lambda x: x, jnp.cos, whole)
      return x + more[None], None

    return jax.lax.scan(body, x, None, length=7)[0].sum()

  found = of(f, mesh).collectives['all-reduce']
  assert found == hlo.Collective(2, COLUMNS * 4 + 4, 1, COLUMNS * 4)


def test_a_loop_counts_once_however_often_it_runs():
  """That is why a plan multiplies."""
  n = 64

  def f(length, x):
    return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=length)[0]

  x = jax.ShapeDtypeStruct((n, n), jnp.float32)
  flops = [
    hlo.of(jax.jit(f, static_argnums=0).lower(k, x).compile()).flops
    for k in (5, 50)
  ]
  assert flops[0] == flops[1]
  assert flops[0] == pytest.approx(2 * n**3, rel=0.01)  # and the counter


def test_what_stops_for_the_host_is_named():
  def f(x):
    jax.debug.print('{}', x.sum())
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

  compiled = jax.jit(f).lower(jax.ShapeDtypeStruct((4,), jnp.float32)).compile()
  assert len(hlo.of(compiled).host_transfers) == 2


# As TPU and GPU compilers write them; not to be had on a CPU.
ASYNCHRONOUS = """\
HloModule jit_f, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add = f32[]{:T(128)} add(%a, %b)
}

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %permute = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, \
bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %moved = bf16[8,128]{1,0:T(8,128)(2,1)} collective-permute-done(%permute)
  %n = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %t = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%n, %moved)
}

ENTRY %main (x.1: f32[4,32], y.1: f32[16]) -> f32[32,32] {
  %x.1 = f32[4,32]{1,0:T(8,128)} parameter(0)
  %y.1 = f32[16]{0:T(128)} parameter(1)
  %z = s4[3]{0} constant({1, 2, 3})
  %start = ((f32[4,32]{1,0}, f32[16]{0}), (f32[32,32]{1,0}, f32[128]{0})) \
all-gather-start(f32[4,32]{1,0:T(8,128)} %x.1, f32[16]{0:T(128)} %y.1), \
replica_groups=[1,8]<=[8], dimensions={0}
  %done = (f32[32,32]{1,0}, f32[128]{0}) all-gather-done(%start)
  %r = (f32[4,32]{1,0}, f32[16]{0}, /*index=2*/s4[3]{0}) \
all-reduce-start(%x.1, %y.1, %z), to_apply=%sum
  %s = (f32[4,32]{1,0}, f32[16]{0}, /*index=2*/s4[3]{0}) all-reduce-done(%r)
  %while = (s32[], bf16[8,128]) while(%t.0), condition=%c, body=%body
  %out = (f32[], u32[], token[]) send(%a, %tok), is_host_transfer=true
  %near = (f32[], u32[], token[]) send(%a, %tok), is_host_transfer=false
  ROOT %g = f32[32,32]{1,0} get-tuple-element(%done), index=0
}
"""


def test_asynchronous_pairs_and_tuples_count_once():
  assert hlo.collectives(ASYNCHRONOUS) == {
    'all-gather': hlo.Collective(1, 4 * (32 * 32 + 128), 0, 0),
    # Three numbers of four bits take two bytes.
    'all-reduce': hlo.Collective(1, 4 * (4 * 32 + 16) + 2, 0, 0),
    'collective-permute': hlo.Collective(1, 2048, 1, 2048),
  }
  assert hlo.host_transfers(ASYNCHRONOUS) == ('out',)


def test_operands_are_read_to_the_end_of_their_brackets():
  assert hlo.operands('%a, f32[2]{0} %b), to_apply=%c') == ['a', 'b']
  assert hlo.operands('%a, %b') == ['a', 'b']
