"""What a program costs, read from its text and from its jaxpr."""

import jax
import jax.numpy as jnp

from ppow_jax.compile import hlo
from ppow_jax.compile.operations import operations

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d","iteration_bounds":["1"]}}'
AXES, RING = "replica_groups=mesh['a'=2,'b'=3,'c'=4]", "{{0,1,2,3}}"
PROGRAM = f"""HloModule jit_f, is_scheduled=true

%inner (p.1: bf16[8,4]) -> bf16[8,4] {{
  ROOT %p.1 = bf16[8,4]{{1,0:T(8,128)}} parameter(0)
}}

%cond (c.1: (s32[], bf16[8,4])) -> pred[] {{
  %c.1 = (s32[]{{:T(128)}}, bf16[8,4]{{1,0}}) parameter(0)
  %limit = s32[]{{:T(128)}} constant(11)
  %at = s32[]{{:T(128)}} get-tuple-element(%c.1), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%at, %limit), direction=LT
}}

%body (b.1: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {{
  %b.1 = (s32[]{{:T(128)}}, bf16[8,4]{{1,0}}) parameter(0)
  %at.1 = s32[]{{:T(128)}} get-tuple-element(%b.1), index=0
  %x = bf16[8,4]{{1,0}} get-tuple-element(%b.1), index=1
  %two = s32[]{{:T(128)}} constant(2)
  %next = s32[]{{:T(128)}} add(%at.1, %two)
  %fusion.1 = bf16[8,4]{{1,0}} fusion(%x), kind=kLoop, calls=%inner, {CYCLES % 100}
  %sent = (bf16[8,4]{{1,0}}, bf16[8,4]{{1,0}}) collective-permute-start(%fusion.1), channel_id=1
  %got = bf16[8,4]{{1,0}} collective-permute-done(%sent)
  ROOT %out = (s32[]{{:T(128)}}, bf16[8,4]{{1,0}}) tuple(%next, %got)
}}

%wait (w.1: (s32[], bf16[8,4])) -> pred[] {{
  %w.1 = (s32[]{{:T(128)}}, bf16[8,4]{{1,0}}) parameter(0)
  ROOT %again = pred[] fusion(%w.1), kind=kLoop, calls=%inner
}}

%outer (o.1: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {{
  %o.1 = (s32[]{{:T(128)}}, bf16[8,4]{{1,0}}) parameter(0)
  %fusion.3 = bf16[8,4]{{1,0}} fusion(%o.1), kind=kLoop, calls=%inner, {CYCLES % 30}
  ROOT %within = (s32[]{{:T(128)}}, bf16[8,4]{{1,0}}) while(%o.1), condition=%wait, body=%body
}}

%dear (d.1: bf16[8,4]) -> bf16[8,4] {{
  %d.1 = bf16[8,4]{{1,0}} parameter(0)
  ROOT %fusion.2 = bf16[8,4]{{1,0}} fusion(%d.1), kind=kLoop, calls=%inner, {CYCLES % 5000}
}}

%start (s.1: bf16[8,4]) -> (bf16[8,4], bf16[16,4]) {{
  %s.1 = bf16[8,4]{{1,0}} parameter(0)
  %part = bf16[16,4]{{1,0}} all-gather(%s.1), {AXES}, device_ids=([4,2,3]T(1,0,2)) {{'a'}}
  ROOT %begun = (bf16[8,4], bf16[16,4]) custom-call(%part), custom_call_target="AsyncCollectiveStart"
}}

%done (e.1: bf16[8,4]) -> bf16[16,4] {{
  %e.1 = bf16[8,4]{{1,0}} parameter(0)
  %same = bf16[16,4]{{1,0}} all-gather(%e.1), {AXES}, device_ids=([4,2,3]T(1,0,2)) {{'a'}}
  ROOT %ended = bf16[16,4] custom-call(%same), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (arg: bf16[8,4]) -> bf16[8,4] {{
  %arg = bf16[8,4]{{1,0:T(8,128)}} parameter(0)
  %few = f32[4]{{0}} fusion(%arg), kind=kLoop, calls=%inner
  %more = f32[6]{{0}} fusion(%arg), kind=kLoop, calls=%inner
  %wide = f32[8,4]{{1,0}} fusion(%arg), kind=kLoop, calls=%inner
  %three = s32[]{{:T(128)}} constant(3)
  %begin = (s32[]{{:T(128)}}, bf16[8,4]{{1,0}}) tuple(%three, %arg)
  %loop = (s32[]{{:T(128)}}, bf16[8,4]{{1,0}}) while(%begin), condition=%cond, body=%body
  %loop.2 = (s32[]{{:T(128)}}, bf16[8,4]{{1,0}}) while(%loop), condition=%wait, body=%outer
  %y = bf16[8,4]{{1,0}} get-tuple-element(%loop.2), index=1
  %all = bf16[32,4]{{1,0}} all-gather(%y), replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, dimensions={{0}}
  %sum = f32[8,4]{{1,0}} all-reduce(%y), replica_groups=[2,4]<=[8], to_apply=%inner
  %both = (f32[4]{{0}}, f32[6]{{0}}) all-reduce(%few, %more), {AXES} {{'b','a'}}, to_apply=%inner
  %spread = f32[2,4]{{1,0}} reduce-scatter(%wide), replica_groups={RING}, dimensions={{0}}, to_apply=%inner
  %begin.2 = (bf16[8,4], bf16[16,4]) fusion(%y), kind=kCustom, calls=%start
  %end.2 = bf16[16,4] fusion(%begin.2), kind=kCustom, calls=%done
  %which = pred[]{{:T(512)}} constant(true)
  %either = bf16[8,4]{{1,0}} conditional(%which, %y, %y), true_computation=%dear, false_computation=%inner
  ROOT %last = bf16[8,4]{{1,0}} fusion(%either), kind=kLoop, calls=%inner, {CYCLES % 7}
}}
"""


def test_loops_count_as_often_as_they_run_and_branches_as_the_dearest():
    """From 3 to 11 by 2: four times; a loop that ends when data say so: as often as is said, but within
    such a loop once."""
    assert hlo.analyse(PROGRAM).cycles == 100 * 4 + 130 + 5000 + 7
    assert hlo.analyse(PROGRAM, 64).cycles == 100 * 4 + 130 * 64 + 5000 + 7


def test_bytes_that_chips_send():
    """In a ring of n: a share n - 1 times; of what is summed, all of it, twice (n - 1) / n, or once where
    each wants a share. What starts in a fusion counts once, and several arrays as all of them."""
    costs = hlo.analyse(PROGRAM)
    array = 8 * 4
    counts = {"collective-permute": 5, "all-gather": 1 + 1, "all-reduce": 1 + 1, "reduce-scatter": 1}
    assert costs.counts == counts
    assert costs.bytes["collective-permute"] == 5 * array * 2
    assert costs.bytes["all-gather"] == array * 2 * 3 + array * 2 * 1
    assert costs.bytes["all-reduce"] == array * 2 * 2 * 3 / 4 + (4 + 6) * 4 * 2 * 5 / 6
    assert costs.bytes["reduce-scatter"] == array * 4 * 3 / 4


def test_operations_of_products_in_loops_branches_and_gradients():
    w = jnp.ones((4, 5))

    def loss(w, x):
        def body(carry, _):
            return carry @ w @ w.T, None

        x, _ = jax.lax.scan(body, x, length=6)
        return jax.lax.cond(x.sum() > 0, lambda: (x @ w).sum(), lambda: (x @ w @ w.T).sum())

    x = jnp.ones((3, 4))
    product = 2 * 3 * 4 * 5
    assert operations(jax.make_jaxpr(loss)(w, x)) == 6 * 2 * product + 2 * product
    assert operations(jax.make_jaxpr(jax.grad(loss))(w, x)) >= 3 * 6 * 2 * product


def test_a_loop_that_ends_when_data_say_so_counts_as_often_as_is_said():
    x = jnp.ones((3, 3))
    program = jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x) @ x)(x)
    assert [operations(program, rounds) for rounds in (1, 64)] == [2 * 54, 65 * 54]
    again = lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)  # noqa: E731
    nested = jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, again, x))(x)
    assert operations(nested, 64) == 64 * 54


def test_products_that_nothing_depends_on_are_no_operations():
    """As the target's distribution along a text, which a rollout computes and does not look at."""
    x = jnp.ones((3, 3))
    unused = jax.jit(lambda x: (x @ x @ x, x @ x))
    assert operations(jax.make_jaxpr(lambda x: unused(x)[1])(x)) == 2 * 27
