"""The plan: what is counted agrees with XLA where XLA counts, loops count as often as they run, and what does not fit is said with numbers.

Real TPU programs are compiled where libtpu is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx
from processes import ROOT

from configs import common
from radit_jax.errors import InputError
from radit_jax.inputs import with_fields
from radit_jax.models.lm import LmConfig
from radit_jax.planning import compiled, flops, hlo, programs, topology
from radit_jax.training import steps
from radit_jax.training.optim import make_optimizer
from radit_jax.types import LmBatch
from radit_jax.weights.lm import abstract_lm

needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed (pip install 'radit-jax[plan]')")


# -- operations -------------------------------------------------------------------------------------------------------------------------


def test_operations_of_a_training_step_are_those_that_xla_counts_in_unrolled_layers(monkeypatch):
    config = LmConfig(vocab_size=384, width=192, layers=3, heads=6, kv_heads=3, head_dim=32, mlp_width=512, remat="full")
    step, state, batch = training_step(config)
    counted = flops.of(step.trace(state, batch).jaxpr).counted

    looped = step.lower(state, batch).compile().cost_analysis()["flops"]
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    unrolled = training_step(config)[0].lower(state, batch).compile().cost_analysis()["flops"]
    assert counted < unrolled < 1.03 * counted  # what we leave out is elementwise
    assert looped < 0.6 * counted  # XLA's own figure for the program that runs


def training_step(config: LmConfig):
    """lm_step jitted, with an abstract state and batch."""
    graphdef, params = nnx.split(abstract_lm(config))
    tx = make_optimizer(tiny.OPTIMIZER, tiny.STEPS)
    state = jax.eval_shape(lambda params: steps.init_state(params, tx), params)
    ints = [jax.ShapeDtypeStruct((1, 4, size), jnp.int32) for size in (96, 96, 96, 24, 24)]
    batch = LmBatch(*ints, jax.ShapeDtypeStruct((1, 4, 24), jnp.float32))
    return jax.jit(lambda state, batch: steps.lm_step(graphdef, tx, state, batch)), state, batch


def test_r_ft_of_both_encoders_is_planned_with_the_passages_that_it_reads():
    sizes = {"lsr_ft.batch": 4, "retriever.max_query_tokens": 16, "retriever.max_passage_tokens": 32, "retriever.dtype": "float32"}

    def step(encoders: str) -> programs.Program:
        c = with_fields(common.base(), {**sizes, "lsr_ft.encoders": encoders})
        return programs.build("lsr_step", c, tiny.mesh(1, 1), programs.Settings())

    query, both = (flops.of(step(encoders).trace().jaxpr).counted for encoders in ("query", "both"))
    k, read = 10, 32 / 16  # passages of a question, and how much longer they are
    # Products are kept (remat=dots), so that no passage goes through the maps twice; what attention computes again is little.
    assert query * (1 + k * read) < both < 1.1 * query * (1 + k * read)


def test_full_precision_takes_six_passes_and_open_loops_run_as_often_as_told():
    def decode(x_8x16, w_16x16):
        exact_8x16 = jnp.einsum("bi,ij->bj", x_8x16, w_16x16, precision="highest")
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: x @ w_16x16, exact_8x16)

    shapes = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
    found = flops.of(jax.jit(decode).trace(*shapes).jaxpr, endless=5)
    one = 2 * 8 * 16 * 16
    assert found == (6 * one, 6 * one + 5 * one)


# -- traffic ----------------------------------------------------------------------------------------------------------------------------

# Eight chips as 4 × 2. Each of 32 layers gathers a kernel over four and sums activations over two; a gradient is scattered over four.
MODULE = """HloModule step

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.1 (input: f32[4096,512]) -> f32[1024,512] {
  %input = f32[4096,512]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[4096,512]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %mine = f32[1024,512]{1,0:T(8,128)} dynamic-slice(%all-reduce.9, %zero, %zero), dynamic_slice_sizes={1024,512}
}

%one_layer (stack: bf16[32,256,512], at: s32[]) -> bf16[256,512] {
  %stack = bf16[32,256,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %at = s32[]{:T(128)} parameter(1)
  %zero.1 = s32[] constant(0)
  %slice = bf16[1,256,512]{2,1,0:T(8,128)(2,1)} dynamic-slice(%stack, %at, %zero.1, %zero.1), dynamic_slice_sizes={1,256,512}
  ROOT %kernel = bf16[256,512]{1,0:T(8,128)(2,1)} bitcast(%slice)
}

%body (carry: (s32[], bf16[64,512], bf16[32,256,512])) -> (s32[], bf16[64,512], bf16[32,256,512]) {
  %carry = (s32[]{:T(128)}, bf16[64,512]{1,0:T(8,128)(2,1)}, bf16[32,256,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = bf16[64,512]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %kernels = bf16[32,256,512]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=2
  %mine.1 = bf16[256,512]{1,0:T(8,128)(2,1)} fusion(%kernels, %i), kind=kLoop, calls=%one_layer
  %kernel.1 = () custom-call(), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="splash"}
  %whole = bf16[1024,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%mine.1), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %y = bf16[64,512]{1,0:T(8,128)(2,1)} all-reduce(%x), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, to_apply=%sum
  %one = s32[] constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[], bf16[64,512], bf16[32,256,512]) tuple(%next, %y, %kernels)
}

%condition (carry.1: (s32[], bf16[64,512], bf16[32,256,512])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, bf16[64,512]{1,0:T(8,128)(2,1)}, bf16[32,256,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %layers = s32[]{:T(128)} constant(32)
  ROOT %more = pred[] compare(%i.1, %layers), direction=LT
}

ENTRY %main (first: (s32[], bf16[64,512], bf16[32,256,512]), gradient: f32[4096,512]) -> f32[1024,512] {
  %first = (s32[]{:T(128)}, bf16[64,512]{1,0:T(8,128)(2,1)}, bf16[32,256,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %gradient = f32[4096,512]{1,0:T(8,128)} parameter(1)
  %while.1 = (s32[], bf16[64,512], bf16[32,256,512]) while(%first), condition=%condition, body=%body
  ROOT %scattered = f32[1024,512]{1,0:T(8,128)} fusion(%gradient), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    found = hlo.traffic(MODULE)
    assert found.counts == {"all-gather": 32, "all-reduce": 32, "reduce-scatter": 1}
    assert found.bytes["all-gather"] == 32 * (1024 * 512 * 2) * 3 / 4
    assert found.bytes["all-reduce"] == 32 * (64 * 512 * 2) * 2 * 1 / 2
    assert found.bytes["reduce-scatter"] == (4096 * 512 * 4) * 3 / 4


def test_memory_traffic_is_what_a_layer_slices_of_a_stack_and_nothing_that_stays_in_the_core():
    kernel, activations, gradient = 256 * 512 * 2, 64 * 512 * 2, 4096 * 512 * 4
    sliced, gathered, summed = 2 * kernel, kernel, 2 * activations  # the gathered kernel is in S(1)
    counter = 4 + 3 * 4  # where to slice; i + 1: two operands and a result
    assert hlo.traffic(MODULE).hbm == 32 * (sliced + gathered + summed + counter) + gradient + gradient // 4


def test_a_loop_that_ends_by_what_it_computes_runs_as_often_as_told():
    open_ended = MODULE.replace("compare(%i.1, %layers), direction=LT", "compare(%i.1, %layers), direction=NE")
    assert hlo.traffic(open_ended, endless=7).counts["all-gather"] == 7


def test_a_module_of_this_machine_is_read():
    mesh = jax.make_mesh((4,), ("data",))
    columns, kernels = (jax.sharding.NamedSharding(mesh, jax.P(*spec)) for spec in ((None, "data"), (None, "data", None)))

    def layers(x, w_5):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w_5)[0]

    shapes = jax.ShapeDtypeStruct((8, 256), jnp.float32), jax.ShapeDtypeStruct((5, 256, 256), jnp.float32)
    text = jax.jit(layers, in_shardings=(columns, kernels)).lower(*shapes).compile().as_text()
    found = hlo.traffic(text)
    assert found.counts["all-reduce"] + found.counts["reduce-scatter"] + found.counts["all-gather"] >= 5
    assert found.hbm >= 5 * 64 * 256 * 4  # each layer's quarter of its kernel


def test_buffers_of_other_memories_and_of_threads_do_not_count():
    assignment = """BufferAssignment:
allocation 0: size 400, page 0, parameter 1, shape |f32[100]| at ShapeIndex {}, maybe-live-out:
allocation 1: size 100, page 0, parameter 2, shape |f32[25]| at ShapeIndex {}:
allocation 2: size 60, page 0, maybe-live-out:
 value: <7 add.1 @0> (size=60,offset=0): f32[15]{0}
allocation 3: size 5000, color 1, page 0, preallocated-temp:
allocation 4: size 1000, page 0, preallocated-temp:
allocation 5: size 7, page 0, thread-local:
"""
    assert compiled.buffers(assignment) == (500, 1000, 60)


# -- topologies -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "chips", "accelerator"),
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64, "v5p-128"),
        ("v5p-64", "v5p:2x4x4", 32, "v5p-64"),  # Google's number counts TensorCores, two a chip
        ("v4-16", "v4:2x2x2", 8, "v4-16"),
        ("v5e-64", "v5e:8x8", 64, "v5e-64"),
        ("v6e:16x16", "v6e:16x16", 256, "v6e-256"),
    ],
)
def test_a_topology_is_named_by_shape_or_by_accelerator(text, name, chips, accelerator):
    found = topology.parse(text)
    assert (found.name, found.chips, found.accelerator) == (name, chips, accelerator)


@pytest.mark.parametrize("text", ["v9:2x2", "v5p:4x4", "v5e:2x2x2", "v5p-65", "v5e:32x32", "tpu", "v5e:0x4", "v6e:x"])
def test_an_unknown_topology_says_what_would_do(text):
    with pytest.raises(InputError, match=re.escape(text)):
        topology.parse(text)


# -- the command ------------------------------------------------------------------------------------------------------------------------


def call(*flags: str, without: str = "") -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    hide = f"import sys; sys.modules[{without!r}] = None; " if without else ""
    run = f"{hide}import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", run, str(ROOT / "launch" / "plan.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def refused(done: subprocess.CompletedProcess) -> str:
    """The one line of an exit with 2."""
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, (done.returncode, done.stdout, done.stderr[-2000:])
    return done.stderr


def test_without_libtpu_one_line_says_what_to_install():
    assert "radit-jax[plan]" in refused(call("--topology=v5e:2x2", without="libtpu"))


@needs_libtpu
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--topology=v9:2x2"], ["v9:2x2", "v5p"]),
        (["--topology=v5e:3x3"], ["v5e:3x3"]),
        (["--topology=v5e:2x2", "--config.mesh.model=3"], ["mesh.model", "4 chips"]),
        (["--topology=v5p-16", "--config.lm_ft.rows=6"], ["lm_ft.rows", "6", "8"]),
        (["--topology=v5e:2x2", "--programs=dance"], ["dance", "lm_step"]),
        (["--topology=v5e:2x2", "--config.mesh.data=3"], ["3×1", "v5e:2x2"]),
    ],
)
def test_a_wrong_wish_is_one_line(flags, expected):
    line = refused(call("--config=configs/lm_ft.py", *flags))
    assert all(part in line for part in expected), line


@needs_libtpu
def test_the_plan_of_search_counts_the_corpus_and_reads_it_once():
    flags = [
        "--topology=v5e:2x2",
        "--config.retriever.vector_dtype=bfloat16",
        "--programs=search",
        "--corpus=1000000",
        "--dim=128",
        "--json",
        "--quick",
    ]
    done = call("--config=configs/lsr_ft.py:dragon_plus", *flags)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-3000:]
    plan = json.loads(done.stdout)
    assert (plan["topology"], plan["accelerator"], plan["chips"]) == ("v5e:2x2", "v5e-4", 4)
    (found,) = plan["programs"]
    vectors, padded = 1_000_000 // 4 * 128 * 2, 1.02
    assert vectors <= found["arguments"] < padded * vectors + 1e6
    assert vectors <= found["traffic"] < 20 * vectors  # and the scores, but not the corpus for every block of it
    queries = 256
    assert 2 * queries * 1_000_000 * 128 <= found["flops"] < padded * 2 * queries * 1_000_000 * 128
    assert found["fits"] and found["total"] + found["spare"] == found["hbm"]
    assert found["rate"] == pytest.approx(queries / max(found["seconds"].values()))
    assert found["outputs"] < 1e5 and not found["full"]


@needs_libtpu
def test_what_does_not_fit_is_said_with_its_bytes_and_the_smallest_slice_that_can():
    flags = [
        "--topology=v6e:1x1",
        "--config.retriever.vector_dtype=bfloat16",
        "--programs=search",
        "--corpus=40000000",
        "--dim=1024",
        "--json",
        "--quick",
    ]
    done = call("--config=configs/lsr_ft.py:dragon_plus", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = json.loads(done.stdout)["programs"]
    assert not found["fits"] and found["spare"] < 0
    assert found["arguments"] >= 40_000_000 * 1024 * 2 and found["collectives"] == {}
    assert found["advice"]["smallest"] == "v6e:2x2" and found["advice"]["there"]["fits"]


def planned(topology: str, **fields) -> dict:
    """The one program of LM-ft's plan; "__" in a field stands for its dot."""
    overrides = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    done = call("--config=configs/lm_ft.py", *overrides, f"--topology={topology}", "--json", "--quick")
    assert done.returncode == 0 and done.stderr == "", done.stderr[-3000:]
    (found,) = json.loads(done.stdout)["programs"]
    return found


@needs_libtpu
def test_the_plan_of_a_training_step_holds_its_state_and_says_how_long_the_run_takes():
    sizes = {"lm_ft__rows": 8, "lm_ft__row_length": 256, "lm_ft__steps": 36}
    found = planned("v5p-16", lm__checkpoint="huggyllama/llama-7b", lm__remat="full", mesh__model=2, **sizes)
    parameters = 6_738_415_616  # of LLaMA-7B
    assert found["note"] == "splash attention" and (found["data"], found["model"]) == (4, 2)
    assert 12 * parameters / 8 <= found["arguments"] < 1.01 * 12 * parameters / 8  # float32 parameters and AdamW's two moments
    tokens, in_layers = 8 * 256, 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    # 2 forward, 4 backward, and 2 for what is computed again (not the last product of a layer: nothing needs it).
    assert found["amount"] == tokens and 7.5 < found["flops"] / (tokens * in_layers) < 8.2
    # Each of 32 layers gathers its kernels over four chips in the forward pass, and again when it is computed a second time.
    kernels = in_layers * 2 / 2  # bytes in bfloat16, half of each on a chip's model index
    assert found["collectives"]["all-gather"]["bytes"] >= 2 * kernels * 3 / 4
    # What is asked for is three quarters of what full remat computes, attention and logits beside it.
    assert 0.7 < found["flops_asked"] / found["flops"] < 0.8
    assert found["utilisation"] == pytest.approx(found["flops_asked"] / found["least_s"] / (8 * 459e12))
    assert found["days"] == pytest.approx(36 * found["least_s"] / 86_400) and found["chip_hours"] == pytest.approx(found["days"] * 24 * 8)


@needs_libtpu
def test_the_plan_of_low_rank_maps_holds_8b_frozen_in_bfloat16_on_one_chip():
    sizes = {"lm_ft__rows": 4, "lm_ft__row_length": 2048, "lm_ft__output_slots": 512}
    found = planned("v6e:1x1", lm__checkpoint="meta-llama/Meta-Llama-3-8B", lm__remat="full", lm_ft__lora__rank=16, **sizes)
    parameters = 8_030_261_248  # of Llama 3 8B
    assert 2 * parameters < found["arguments"] < 2.02 * parameters and found["fits"]
    # The gradients of weights are not computed: forward, again, and back, of which two are asked for.
    assert 0.6 < found["flops_asked"] / found["flops"] < 0.7
