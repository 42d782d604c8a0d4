"""`lora_dropout` on experts: the numbers for the masks that were drawn, the masks, and where PEFT would refuse it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from support import zoo
from support.experts_loop import Experts, cases, compare, factors, loop
from torch import nn

import peft_moe_compat
from peft_moe_compat import ExpertLora, LayoutError
from peft_moe_compat.forward import dropout
from peft_moe_compat.forward.layer import experts_forward

FAMILIES = pytest.mark.parametrize("family", zoo.FAMILIES)
ONE = zoo.FAMILIES[0]


def dropping(loras, p):
    """The same factors, of which the first rank has another dropout than the others: as of two adapters."""
    runs = {name: (1, lora.rank - 1) if lora.rank > 1 else (1,) for name, lora in loras.items()}
    return {
        name: ExpertLora(lora.A, lora.B, lora.scaling, tuple(zip(runs[name], (p, 0.3), strict=False)))
        for name, lora in loras.items()
    }


def by_token(masks, loras, index):
    """Masks as they were drawn, "S in" each and sorted by expert, as the loop wants them."""
    order, left, found = torch.sort(index.reshape(-1))[1], iter(masks), {}
    for name, lora in sorted(loras.items(), reverse=True):  # gate_up_proj or up_proj, then down_proj
        runs = []
        for rank, p in lora.dropout:
            sorted_rows = next(left) if p else torch.ones(len(order), lora.in_features, dtype=torch.float64)
            rows = torch.empty_like(sorted_rows)
            rows[order] = sorted_rows
            runs.append(rows.double().view(*index.shape, 1, -1).expand(-1, -1, rank, -1))
        found[name] = torch.cat(runs, 2)
    assert next(left, None) is None
    return found


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from([0.0, 0.2, 0.9]))
def test_the_forward_and_all_gradients_are_those_of_the_masks(case, p):
    E, H, I, index, flags, ranks, scaling = case
    torch.manual_seed(0)
    experts = Experts(E, H, I, **flags)
    loras = dropping(factors(experts, E, H, I, ranks, scaling), p)
    hidden = torch.randn(index.shape[0], H, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(index.shape, dtype=torch.float64, requires_grad=True)
    leaves = [hidden, weights, *experts.parameters(), *(t for lora in loras.values() for t in (lora.A, lora.B))]
    drawn, stock = [], dropout.kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropout, "kept", lambda *how: drawn.append(stock(*how)) or drawn[-1])
        ours = experts_forward(experts, loras, hidden, index, weights)
    exact = loop(experts, loras, hidden, index, weights, by_token(drawn, loras, index))
    compare(ours, exact, 1e-9)
    grad = torch.randn_like(exact)
    mine = torch.autograd.grad(ours, leaves, grad, allow_unused=True)
    theirs = torch.autograd.grad(exact, leaves, grad, allow_unused=True)
    for leaf, a, b in zip(leaves, mine, theirs, strict=True):
        compare(*(torch.zeros_like(leaf) if g is None else g for g in (a, b)), 1e-8)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_every_routed_row_has_a_mask_of_its_own(p, compiled):
    """Identities all through, so that what reaches lora_A comes out."""
    torch._dynamo.reset()
    H, T, k = 16, 40, 2
    experts = Experts(2, H, H, gated=False, transposed=False, biased=False)
    experts.act_fn = lambda rows: rows
    with torch.no_grad():
        experts.up_proj.copy_(torch.eye(H, dtype=torch.float64))
        experts.down_proj.zero_()
    eye = torch.eye(H, dtype=torch.float64).expand(2, H, H)
    loras = {"down_proj": ExpertLora(eye, eye, 1.0, ((H, p),) if p else ())}
    index = torch.arange(2).expand(T, k)

    def forward(hidden, weights):
        return experts_forward(experts, loras, hidden, index, weights)

    run = torch.compile(forward, backend="aot_eager", fullgraph=True) if compiled else forward
    torch.manual_seed(1)
    hidden = torch.rand(T, H, dtype=torch.float64) + 1
    masks = []
    for each in range(k):  # of the rows of the two experts, in one forward: the generator stands where it stood
        torch.manual_seed(2)
        masks.append(run(hidden, nn.functional.one_hot(torch.tensor(each), k).expand(T, k).double()) / hidden)
    kept = torch.stack(masks)
    scale = 1 / (1 - p) if p < 1 else 0
    assert torch.isclose(kept, torch.tensor(scale).double()).logical_or(kept == 0).all()
    assert abs((kept == 0).double().mean() - p) <= 5 * (p * (1 - p) / kept.numel()) ** 0.5
    if 0 < p < 1:
        assert not torch.equal(*masks)
        assert not torch.equal(run(hidden, torch.ones(T, k).double()), run(hidden, torch.ones(T, k).double()))
    torch._dynamo.reset()


@pytest.mark.parametrize("p", [0.5, torch.tensor([[0.2], [0.0], [0.9]] * 10)], ids=["one", "each row's"])
def test_a_mask_is_of_its_seed_however_the_rows_are_strided(p):
    rows, places = torch.rand(8, 30).T, torch.arange(30)
    assert torch.equal(dropout.kept(rows, p, 5, places), dropout.kept(rows.contiguous(), p, 5, places))
    rows.requires_grad_()
    out = dropout.dropped(rows, p)
    gradient = torch.ones_like(out, memory_format=torch.contiguous_format)
    assert torch.equal(torch.autograd.grad(out, rows, gradient)[0] * rows, out)


@pytest.mark.parametrize("shape", [(0, 3), (0, 8), (1, 1), (3, 2), (2, 5)])
def test_masks_of_few_elements(shape):
    rows, places = torch.ones(shape), torch.arange(shape[0])
    for p in (0.5, torch.full((shape[0], 1), 0.5)):
        assert dropout.kept(rows, p, 3, places).shape == shape
    assert torch.equal(dropout.kept(rows, 0.0, 3, places), rows)
    assert not dropout.kept(rows, 1.0, 3, places).count_nonzero()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_are_as_independent_as_chance_has_them(p):
    """Of rows, of columns, and of the four corners of rectangles; seeds and rows beside each other, too."""
    n = 512
    for seed, first in ((0, 0), (1, 0), (2**63 - 2, 2**40)):
        places = torch.arange(first, first + n)
        mask, other = (dropout.kept(torch.empty(n, n - 2), p, s, places).double() for s in (seed, seed + 1))
        assert torch.equal(mask != 0, mask > 1)
        assert abs(mask.max() * (1 - p) - 1) < 1e-4
        unit = [((each != 0).double() - (1 - p)) / (p * (1 - p)) ** 0.5 for each in (mask, other)]
        assert all(abs(each.mean()) * n < 5 for each in unit)
        assert abs((unit[0] * unit[1]).mean()) * n < 5
        for rows in (unit[0], unit[0].T):
            correlations = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0)
            assert correlations.abs().max() * n**0.5 < 8
            assert abs(correlations.square().sum() / (n * (n - 1) / rows.shape[1]) - 1) < 0.05


def test_a_row_has_one_mask_whoever_computes_it():
    """A batch whole, and in two parts that are told which of its rows they have, which no two rows share."""
    E, H, k = 4, 16, 2
    torch.manual_seed(0)
    experts = Experts(E, H, H, gated=True, transposed=False, biased=False)
    loras = dropping(factors(experts, E, H, H, (4, 4), 1.0), 0.5)
    hidden, weights = (torch.rand(12, n, dtype=torch.float64) for n in (H, k))
    index, places = torch.rand(12, E).argsort(1)[:, :k], torch.arange(12 * k).view(12, k)
    routed = hidden, index, weights
    whole = after(7, experts_forward, experts, loras, *routed)
    parts = [
        after(7, experts_forward, experts, loras, *(t[at] for t in routed), None, places[at])
        for at in (torch.arange(0, 12, 2), torch.arange(11, 0, -2))
    ]
    compare(torch.stack([parts[0], parts[1].flip(0)], 1).flatten(0, 1), whole, 1e-12)
    assert (after(7, experts_forward, experts, loras, *(t[6:] for t in routed)) - whole[6:]).abs().min(1)[0].max() > 0
    drawn = dropout.kept(torch.empty(64, 64), 0.5, 7, torch.arange(64))
    assert len(drawn.unique(dim=0)) == 64


def test_no_mask_is_kept_for_the_backward():
    experts = Experts(4, 32, 16, gated=True, transposed=False, biased=False).requires_grad_(False)
    loras = factors(experts, 4, 32, 16, (4, 4), 1.0)
    index, weights = torch.randint(4, (50, 2)), torch.rand(50, 2, dtype=torch.float64)

    def saved(loras):
        kept = {}
        hidden = torch.randn(50, 32, dtype=torch.float64, requires_grad=True)
        note = lambda t: kept.update({(t.data_ptr(), t.shape): t.numel() * t.itemsize}) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            experts_forward(experts, loras, hidden, index, weights)
        return sum(kept.values())

    one = {name: ExpertLora(lora.A, lora.B, 1.0, ((lora.rank, 0.5),)) for name, lora in loras.items()}
    assert saved(one) <= saved(loras) + 8 * index.numel()  # each row's place


def model_of(family, p=0.3, **config):
    return zoo.peft_model(zoo.tiny_model(family, **config), lora_dropout=p)


def after(seed, function, *args):
    torch.manual_seed(seed)
    return function(*args)


@zoo.needs_registry
@FAMILIES
def test_a_seed_is_a_loss_and_evaluation_is_stock_peft_s(family, stock):
    model, ids = model_of(family), zoo.token_ids()
    first, again, other = (after(seed, zoo.loss_and_gradients, model, ids) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (first["logits"] - other["logits"]).abs().max() > 1e-3
    model.eval()
    zoo.assert_same(zoo.loss_and_gradients(model, ids), stock(zoo.loss_and_gradients, model, ids), 1e-4)


@zoo.needs_registry
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_has_the_same_masks(reentrant):
    model, ids = model_of(ONE, use_cache=False), zoo.token_ids()
    plain = after(3, zoo.loss_and_gradients, model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    zoo.assert_same(after(3, zoo.loss_and_gradients, model, ids), plain, 1e-4)


@zoo.needs_registry
def test_a_compiled_model_trains_with_it():
    torch._dynamo.reset()
    model, ids = model_of(ONE), zoo.token_ids()
    compiled = torch.compile(model, backend="aot_eager")
    one, same, other = (after(seed, lambda: compiled(input_ids=ids, labels=ids).loss) for seed in (3, 3, 4))
    assert one == same != other
    one.backward()
    assert all(p.grad.count_nonzero() for n, p in model.named_parameters() if "lora_" in n)
    torch._dynamo.reset()


@zoo.needs_registry
def test_each_of_two_adapters_has_its_own():
    model, ids = model_of(ONE, p=0.0), zoo.token_ids()
    for wrapper in zoo.wrappers(model):
        zoo.add_adapter(wrapper, "second", 2)
        wrapper.set_adapter(["default", "second"])
    zoo.randomise(model)
    plain = zoo.loss_and_gradients(model, ids)["logits"]
    for wrapper in zoo.wrappers(model):
        wrapper.lora_dropout["second"] = nn.Dropout(1.0)
    half = zoo.loss_and_gradients(model, ids)["logits"]
    for wrapper in zoo.wrappers(model):
        wrapper.set_adapter(["default"])
    compare(half, zoo.loss_and_gradients(model, ids)["logits"], 1e-5)
    assert (plain - half).abs().max() > 1e-3


@zoo.needs_registry
def test_merging_takes_the_update_whole():
    model, ids = model_of(ONE), zoo.token_ids()
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        merged = model.train().merge_and_unload().eval()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=0, atol=1e-4)


@zoo.needs_registry
def test_a_saved_adapter_says_it_and_loads_to_train_and_to_infer(tmp_path, stock):
    model, ids = model_of(ONE), zoo.token_ids()
    expected = zoo.loss_and_gradients(model.eval(), ids)["logits"]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["lora_dropout"] == 0.3
    base = model.unload()
    with pytest.raises(ValueError, match="lora_dropout"):
        stock(PeftModel.from_pretrained, zoo.tiny_model(ONE), tmp_path)
    inferring = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        compare(inferring(input_ids=ids).logits, expected, 1e-5)
    training = PeftModel.from_pretrained(inferring.unload(), tmp_path, is_trainable=True).train()
    with torch.no_grad():
        assert (training(input_ids=ids).logits - expected).abs().max() > 1e-3


def test_where_peft_s_own_forward_runs_training_is_refused_and_inference_is_not(tmp_path, stock):
    base, ids = zoo.tiny_model(ONE, experts_implementation="eager").eval(), zoo.token_ids()
    targets = peft_moe_compat.expert_parameters(base)
    config = LoraConfig(target_modules=[], target_parameters=targets, lora_dropout=0.3)
    with pytest.raises(LayoutError, match="lora_dropout"):
        get_peft_model(base, config)
    base = zoo.tiny_model(ONE, experts_implementation="eager").eval()
    model = zoo.peft_model(base)
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"lora_dropout": 0.3}), encoding="utf-8")
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    with torch.no_grad():
        compare(loaded(input_ids=ids).logits, expected, 1e-5)
        with pytest.raises(LayoutError, match="lora_dropout"):
            loaded.train()(input_ids=ids)
    with pytest.warns(peft_moe_compat.CompatWarning, match="lora_dropout"):
        peft_moe_compat.report(loaded)
