"""torch.compile in training: whole models and single layers against eager.

Whole models go through "aot_eager", since the statements are about graphs and autograd, which inductor shares, and it
takes a third of the time; a decoder layer goes through inductor, which needs a C++ compiler.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo as dynamo
from accelerate.utils import compile_regions
from peft import LoraConfig, get_peft_model
from support import zoo

import peft_moe_compat

TOLERANCE = 1e-5
FAMILIES = ["qwen3_moe", "gpt_oss"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


def adapted_model(family, num_hidden_layers=1, **lora):
    """LoRA on the experts and on attention; equal layers."""
    kinds = {"layer_types": ["full_attention"] * num_hidden_layers} if family == "gpt_oss" else {}
    model = zoo.tiny_model(family, num_hidden_layers=num_hidden_layers, use_cache=False, **kinds)
    targets = peft_moe_compat.expert_parameters(model)
    model = get_peft_model(
        model,
        LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], target_parameters=targets, **lora),
    )
    zoo.randomise(model)
    return model


def checkpointed(model):
    """Without the hook that asks for gradients of the embeddings, which only reentrant checkpointing needs."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    return model


def same_names(found):
    return {name.replace("_orig_mod.", ""): value for name, value in found.items()}


def compiled_graphs():
    return dynamo.utils.counters["stats"]["unique_graphs"]


class Saved:
    """What autograd keeps between forward and backward, parameters apart."""

    def __init__(self, model):
        self.parameters = {p.data_ptr() for p in model.parameters()}
        self.shapes = []

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def _pack(self, tensor):
        if tensor.data_ptr() not in self.parameters:
            self.shapes.append(tuple(tensor.shape))
        return tensor

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize(
    ("family", "checkpointing"), [("qwen3_moe", False), ("gpt_oss", True)], ids=["plain", "checkpointed"]
)
def test_a_whole_model_trains_in_one_graph_of_any_length(family, checkpointing):
    """Equal to eager over five batch sizes and lengths, compiled once; no gathered rows are kept for backward."""
    model = adapted_model(family)
    if checkpointing:
        checkpointed(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    sizes = [(2, 9), (2, 11), (3, 7), (4, 13), (2, 21)]
    k, H = 2, model.config.hidden_size
    for step, (batch, length) in enumerate(sizes):
        ids = zoo.token_ids(batch, length)
        eager = zoo.loss_and_gradients(model, ids)
        with Saved(model) as saved, torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            found = same_names(zoo.loss_and_gradients(compiled, ids))
        zoo.assert_same(found, eager, TOLERANCE)
        S = batch * length * k
        assert any("experts" in name for name in found)
        assert any("q_proj" in name for name in found)
        assert saved.shapes
        kept = [shape for shape in saved.shapes if shape[:1] == (S,) and H in shape[1:]]
        assert len(kept) <= 1  # of the down projection, for the gradient of the routing weights
    assert compiled_graphs() == 1


def routed(tokens):
    index, weights = zoo.routing(num_experts=6, tokens=tokens)
    return {"hidden_states": torch.randn(tokens, 32), "top_k_index": index, "top_k_weights": weights}


def test_a_batch_of_one_compiles_once_more():
    """torch specialises on sizes of one; from then on nothing is compiled, whichever the batch."""
    layer = zoo.wrappers(adapted_model("qwen3_moe"))[0]
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, tokens in enumerate([5, 1, 9, 1, 3]):
        given = routed(tokens)
        with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
            found = same_names(zoo.gradients(compiled, given, {}))
        zoo.assert_same(found, zoo.gradients(layer, given, {}), TOLERANCE)
    assert compiled_graphs() == 2


def compile_in_place(model, **options):
    for layer in model.get_base_model().model.layers:
        layer.compile(**options)
    return model


@pytest.mark.parametrize("regional", [compile_regions, compile_in_place], ids=lambda way: way.__name__)
def test_equal_decoder_layers_share_one_graph(regional):
    """Three layers in two graphs: the input of the first, from frozen embeddings, asks for no gradient."""
    model, ids = adapted_model("qwen3_moe", num_hidden_layers=3), zoo.token_ids()
    eager = zoo.loss_and_gradients(model, ids)
    graphs = []

    def backend(graph, inputs):
        graphs.append(any("experts" in str(node.target) for node in graph.graph.nodes if node.op == "placeholder"))
        return dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = regional(model, fullgraph=True, backend=backend)
    for _ in range(2):
        zoo.assert_same(same_names(zoo.loss_and_gradients(compiled, ids)), eager, TOLERANCE)
    assert sum(graphs) == 2


def test_with_input_gradients_all_decoder_layers_share_one_graph():
    """With activation checkpointing, which sets those up."""
    model, ids = adapted_model("qwen3_moe", num_hidden_layers=2), zoo.token_ids()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    eager = zoo.loss_and_gradients(model, ids)
    compile_in_place(model, fullgraph=True, backend="aot_eager")
    zoo.assert_same(zoo.loss_and_gradients(model, ids), eager, TOLERANCE)
    assert compiled_graphs() == 1


def test_upstream_input_gradients_break_the_graph_of_a_whole_model():
    """What checkpointing with PEFT sets up by itself; nothing of PEFT's or ours is in this model."""
    model = zoo.tiny_model("qwen3_moe", num_hidden_layers=1, use_cache=False).requires_grad_(False)
    model.enable_input_require_grads()
    with pytest.raises(dynamo.exc.Unsupported, match="requires_grad_"):
        torch.compile(model, fullgraph=True, backend="eager")(input_ids=zoo.token_ids())


@pytest.mark.parametrize("package", ["qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark"])
def test_rows_computed_elsewhere_contribute_nothing_to_a_training_graph(package):
    """Of expert parallelism; gated, biased, without a gate, and with a norm after the experts."""
    experts = zoo.build(next(found for found in zoo.DECORATED if found.package == package))
    experts._is_expert_parallel = True
    layer = zoo.wrap(experts, [f"experts.{name}" for name in peft_moe_compat.model.experts.projections(experts)])[
        "experts"
    ]
    index, weights = zoo.routing(tokens=20)
    index[::3, 0] = zoo.E
    given = {"hidden_states": torch.randn(20, zoo.H), "top_k_index": index, "top_k_weights": weights}
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with Saved(layer) as saved:
        found = same_names(zoo.gradients(compiled, given, {}))
    zoo.assert_same(found, zoo.gradients(layer, given, {}), TOLERANCE)
    rows_kept = saved.shapes.count((20 * zoo.TOP_K, zoo.H))
    assert rows_kept <= 1 + (package == "muse_spark")  # of the down projection, for the routing weights and the norm


@pytest.mark.parametrize("package", FAMILIES)
def test_in_bfloat16_a_training_graph_is_as_near_to_float64_as_stock(package, stock):
    experts = zoo.build(next(found for found in zoo.DECORATED if found.package == package), intermediate=16)
    names = [f"experts.{name}" for name in peft_moe_compat.model.experts.projections(experts)]
    layer = zoo.wrap(experts.to(torch.bfloat16), names)["experts"]
    index, weights = zoo.routing(tokens=500)
    low = [torch.randn(500, zoo.H).bfloat16(), index, weights.bfloat16()]
    reference = copy.deepcopy(layer).double()
    reference.get_base_layer().config._experts_implementation = "eager"  # transformers' grouped_mm takes no float64
    exact = stock(reference, low[0].double(), index, low[2].double())

    def error(out):
        return ((out.double() - exact).norm() / exact.norm()).item()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    ours, theirs = error(compiled(*low)), error(stock(layer, *low))
    assert 0 < ours <= 1.05 * theirs


def test_a_decoder_layer_through_inductor():
    """LoRA on attention and experts; the gathered rows stay out of what is saved here too."""
    model, ids = adapted_model("qwen3_moe"), zoo.token_ids()
    eager = zoo.loss_and_gradients(model, ids)
    with Saved(model) as saved:
        found = zoo.loss_and_gradients(compile_in_place(model, fullgraph=True), ids)
    zoo.assert_same(found, eager, TOLERANCE)
    assert compiled_graphs() == 1
    assert saved.shapes
    assert len([shape for shape in saved.shapes if shape[:1] == (2 * ids.numel(),) and 32 in shape[1:]]) <= 1
