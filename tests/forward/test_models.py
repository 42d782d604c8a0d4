"""Whole models of every family: training, checkpointing, compiling, saving, merging, low precision."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from support import zoo
from support.precision import LOW, low_precision
from torch import nn

import peft_moe_compat
from peft_moe_compat.model.wrappers import native_reason

FAMILIES = pytest.mark.parametrize("family", zoo.FAMILIES)
ONE = zoo.FAMILIES[0]
TOLERANCE = 1e-4


def model_of(family, **config):
    return zoo.peft_model(zoo.tiny_model(family, **config))


@FAMILIES
def test_loss_and_every_gradient_equal_stock_peft(family, stock):
    model, ids = model_of(family), zoo.token_ids()
    ours = zoo.loss_and_gradients(model, ids)
    zoo.assert_same(ours, stock(zoo.loss_and_gradients, model, ids), TOLERANCE)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n in ours if "lora_" in n}
    with model.disable_adapter(), torch.no_grad():
        assert (model(input_ids=ids).logits - ours["logits"]).abs().max() > 1e-3


@FAMILIES
def test_nothing_on_the_module_tree_changes(family, stock):
    model = model_of(family)
    before = {n: (id(m), type(m), sorted(vars(m))) for n, m in model.named_modules()}
    zoo.loss_and_gradients(model, zoo.token_ids())
    assert {n: (id(m), type(m), sorted(vars(m))) for n, m in model.named_modules()} == before


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, stock):
    model, ids = model_of(ONE, use_cache=False), zoo.token_ids()
    plain = zoo.loss_and_gradients(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    zoo.assert_same(zoo.loss_and_gradients(model, ids), plain, TOLERANCE)
    zoo.assert_same(zoo.loss_and_gradients(model, ids), stock(zoo.loss_and_gradients, model, ids), TOLERANCE)


@FAMILIES
def test_merge_and_unload_equals_the_unmerged_forward(family):
    model, ids = model_of(family).eval(), zoo.token_ids()
    with torch.no_grad():
        unmerged = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        assert zoo.wrappers(merged) == []
        torch.testing.assert_close(merged(input_ids=ids).logits, unmerged, rtol=0, atol=1e-4)


@pytest.mark.parametrize("direction", ["saved by us, loaded by stock", "saved by stock, loaded by us"])
def test_adapters_travel_between_the_two_paths(direction, tmp_path, stock):
    from peft import PeftModel

    torch.manual_seed(0)
    base = zoo.tiny_model(ONE).eval()
    untouched = copy.deepcopy(base)
    model, ids = zoo.peft_model(base).eval(), zoo.token_ids()

    def logits(m):
        with torch.no_grad():
            return m(input_ids=ids).logits

    def load():
        loaded = PeftModel.from_pretrained(untouched, tmp_path).eval()
        return logits(loaded)

    if direction.startswith("saved by us"):
        expected = logits(model)
        model.save_pretrained(tmp_path)
        found = stock(load)
    else:
        expected = stock(logits, model)
        stock(model.save_pretrained, tmp_path)
        found = load()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_state_dict_is_the_same_with_and_without_us(stock):
    from peft import get_peft_model_state_dict

    model = model_of(ONE)
    zoo.loss_and_gradients(model, zoo.token_ids())
    ours = get_peft_model_state_dict(model)
    theirs = stock(get_peft_model_state_dict, model)
    assert ours.keys() == theirs.keys()
    assert sum("lora_" in name for name in theirs) == len(theirs) == 2 * len(zoo.wrappers(model))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


class Bytes(torch.utils.data.Dataset):
    """Windows of this very file."""

    def __init__(self, length=16, count=24):
        text = open(__file__, "rb").read()  # noqa: SIM115, PTH123
        rows = [[b % 60 + 1 for b in text[i * length : (i + 1) * length]] for i in range(count)]
        self.rows = torch.tensor(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def test_trainer_takes_the_same_steps(tmp_path, stock):
    def train(model):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=5,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Bytes())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model = model_of(ONE)
    twin = copy.deepcopy(model)
    ours, theirs = train(model), stock(train, twin)
    assert len(ours) == 5
    assert min(ours[1:]) < ours[0]
    assert ours == pytest.approx(theirs, abs=1e-4)
    trained = dict(twin.named_parameters())
    moved = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(moved) == 2 * len(zoo.wrappers(model)) > 0
    for name, parameter in moved.items():
        torch.testing.assert_close(parameter, trained[name], rtol=0, atol=2e-3)


def test_generation_equals_stock(stock):
    model = model_of(ONE).eval()
    ids = zoo.token_ids(1, 5)

    def generate():
        return model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)

    assert torch.equal(generate(), stock(generate))


@zoo.each([c for c in zoo.DECORATED if c.package == "qwen3_moe"])
def test_weights_turned_by_another_library_run_once_declared(found):
    """The module still says is_transposed=False over weights stored "E in out"; the declaration wins."""
    experts = zoo.build(found)
    straight = copy.deepcopy(experts)
    for name in peft_moe_compat.model.experts.projections(experts):
        setattr(experts, name, nn.Parameter(getattr(experts, name).detach().transpose(1, 2).contiguous()))
    holder = zoo.wrap(experts, [f"experts.{n}" for n in peft_moe_compat.model.experts.projections(experts)])
    peft_moe_compat.declare_layout(experts, is_transposed=True)
    index, weights = zoo.routing()
    hidden = torch.randn(zoo.T, zoo.H)
    with torch.no_grad():
        for wrapper in zoo.wrappers(holder):
            weight = getattr(straight, wrapper.parameter_name)
            weight += wrapper.get_delta_weight("default").transpose(1, 2)
        expected = straight(hidden, index, weights)
    torch.testing.assert_close(holder["experts"](hidden, index, weights), expected, rtol=1e-4, atol=1e-4)


@zoo.each([c for c in zoo.DECORATED if c.package == "qwen3_moe"])
def test_a_declaration_that_cannot_be_is_refused_at_use(found):
    experts = zoo.build(found)
    holder = zoo.wrap(experts, ["experts.down_proj"])
    peft_moe_compat.declare_layout(experts, is_transposed=True)
    index, weights = zoo.routing()
    with pytest.raises(peft_moe_compat.LayoutError, match=r"gate_up_proj is read as 'E in out'.*declare_layout"):
        holder["experts"](torch.randn(zoo.T, zoo.H), index, weights)


@zoo.each([c for c in zoo.DECORATED if c.package == "gpt_oss"])
def test_arguments_by_the_names_of_the_classs_own_forward(found):
    holder = zoo.wrap(zoo.build(found), ["experts.gate_up_proj", "experts.down_proj"])
    hidden, (index, weights) = torch.randn(zoo.T, zoo.H), zoo.routing()
    named = holder["experts"](hidden, router_indices=index, routing_weights=weights)
    assert torch.equal(named, holder["experts"](hidden, index, weights))


def test_a_model_built_and_run_before_activation_switches_over(stock):
    peft_moe_compat.deactivate()
    model, ids = model_of(ONE), zoo.token_ids()
    theirs = zoo.loss_and_gradients(model, ids)
    peft_moe_compat.activate()
    zoo.assert_same(zoo.loss_and_gradients(model, ids), theirs, TOLERANCE)


def test_base_weights_that_train_too_get_their_gradient(stock):
    model, ids = model_of(ONE), zoo.token_ids()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    ours = zoo.loss_and_gradients(model, ids)
    theirs = stock(zoo.loss_and_gradients, model, ids)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-5)


def test_autocast_gives_stocks_numbers(stock):
    """Over float32 weights: the experts stay in float32, since grouped products are not autocast-enabled."""
    model = model_of(ONE)
    outermost = next(m for n, m in model.named_modules() if n.endswith("experts"))
    inner = outermost.get_base_layer()
    hidden, (index, weights) = torch.randn(zoo.T, 32), zoo.routing(6)
    given = {"hidden_states": hidden, "top_k_index": index, "top_k_weights": weights}
    if not zoo.FUSED:  # transformers before 5.0 reads the whole distribution
        given["top_k_weights"] = torch.zeros(zoo.T, inner.num_experts).scatter(1, index, weights)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return zoo.gradients(outermost, given, {})

    zoo.assert_same(run(), stock(run), 2e-2)


@pytest.mark.parametrize("projections", [slice(None), slice(0, 1), slice(-1, None)], ids=["both", "up", "down"])
@pytest.mark.parametrize("lora_std", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@zoo.each(LOW)
def test_low_precision_is_as_near_to_float64_as_stock(found, dtype, lora_std, projections, stock):
    (output, effect), (stock_output, stock_effect) = low_precision(dtype, lora_std, found, stock, projections)
    assert 0 < stock_output < 0.05
    assert output <= 1.05 * stock_output
    assert effect <= 1.05 * stock_effect


@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if f in ("qwen3_moe", "gpt_oss")])
def test_compiles_into_one_graph_without_recompiling(family, stock):
    import torch._dynamo as dynamo

    model = model_of(family)
    if not zoo.FUSED:
        pytest.skip("stock PEFT's forward, which transformers 4 leaves in place, breaks the graph (peft #3304)")
    assert [native_reason(w) for w in zoo.wrappers(model)] == [None] * 4
    dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return dynamo.backends.debugging.aot_eager(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ids = zoo.token_ids()
    found = zoo.loss_and_gradients(compiled, ids)
    found = {n.removeprefix("_orig_mod."): v for n, v in found.items()}
    zoo.assert_same(found, zoo.loss_and_gradients(model, ids), TOLERANCE)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.step()
        zoo.loss_and_gradients(compiled, zoo.token_ids())
    assert len(graphs) == 1
    dynamo.reset()


@zoo.each([c for c in zoo.DECORATED if c.package == "qwen3_moe"])
def test_the_experts_layer_compiles_with_inductor(found):
    """In bfloat16, where inductor would hand torch's own grouped_mm strides that it refuses."""
    dtype = torch.bfloat16
    torch._dynamo.reset()
    experts = zoo.build(found).to(dtype)
    holder = zoo.wrap(experts, [f"experts.{n}" for n in peft_moe_compat.model.experts.projections(experts)])
    index, weights = zoo.routing()
    given = {"hidden_states": torch.randn(zoo.T, zoo.H), "top_k_index": index, "top_k_weights": weights}
    given = {n: v.to(dtype) if v.is_floating_point() else v for n, v in given.items()}
    eager = zoo.gradients(holder["experts"], given, {})
    compiled = torch.compile(holder["experts"], fullgraph=True)
    found_ = {n.removeprefix("_orig_mod."): v for n, v in zoo.gradients(compiled, given, {}).items()}
    zoo.assert_same(found_, eager, 5e-2)
    torch._dynamo.reset()


def test_hooks_on_the_experts_module_run():
    """FSDP, accelerate and checkpointing enter through `__call__` of the experts module."""
    model, ids = model_of(ONE), zoo.token_ids()
    experts = zoo.wrappers(model)[0].get_base_layer()
    seen = []
    experts.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    experts.register_forward_hook(lambda m, args, out: seen.append("post"))
    model(input_ids=ids)
    assert seen == ["pre", "post"]


def test_accelerates_hooked_forward_still_runs_fast(stock):
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, ids = model_of(ONE), zoo.token_ids()
    expected = zoo.loss_and_gradients(model, ids)
    wrapper = zoo.wrappers(model)[0]
    reason = native_reason(wrapper)
    add_hook_to_module(wrapper.get_base_layer(), ModelHook())
    assert native_reason(wrapper) == reason
    zoo.assert_same(zoo.loss_and_gradients(model, ids), expected, 1e-6)


def test_an_implementation_we_do_not_own_runs_pefts_forward_exactly(stock):
    model, ids = model_of(ONE), zoo.token_ids()
    for wrapper in zoo.wrappers(model):
        config = getattr(wrapper.get_base_layer(), "config", None)
        if config is not None:
            config._experts_implementation = "eager"
    assert all(native_reason(w) for w in zoo.wrappers(model))
    ours, theirs = zoo.loss_and_gradients(model, ids), stock(zoo.loss_and_gradients, model, ids)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_batched_mm_is_taken_over_too(stock):
    model, ids = model_of(ONE), zoo.token_ids()
    before = zoo.loss_and_gradients(model, ids)
    for wrapper in zoo.wrappers(model):
        config = getattr(wrapper.get_base_layer(), "config", None)
        if config is not None:
            config._experts_implementation = "batched_mm"
    zoo.assert_same(zoo.loss_and_gradients(model, ids), before, TOLERANCE)
    zoo.assert_same(zoo.loss_and_gradients(model, ids), stock(zoo.loss_and_gradients, model, ids), TOLERANCE)
