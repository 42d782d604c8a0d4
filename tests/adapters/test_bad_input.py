"""Files that cannot be used: an error of this package's own, exit code 2, and nothing written."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.adapter_files import PREFIX, Spec, load, read_config, save, save_fused, save_per_expert
from typer.testing import CliRunner

from peft_moe_compat.adapters.convert import convert_adapter
from peft_moe_compat.adapters.inspect import inspect_adapter
from peft_moe_compat.adapters.verify import verify_adapters
from peft_moe_compat.cli.main import app
from peft_moe_compat.errors import PeftMoeCompatError

SPEC = Spec(attention=True)
NAME, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TO = "peft==0.18.1,transformers==5.0.0"


def adapter(folder: Path) -> Path:
    factors = SPEC.factors(("gate_up", "down"))
    return save_fused(folder / "in", SPEC, factors, peft_version="0.21.2")


def truncate(folder: Path) -> None:
    raw = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(raw[:-5])


def wrong_json(folder: Path) -> None:
    (folder / CONFIG).write_text('{"r": 2,')


def twice(folder: Path) -> None:
    (folder / CONFIG).write_text('{"r": 2, "r": 3}')


def big_header(folder: Path) -> None:
    (folder / NAME).write_bytes(struct.pack("<Q", 50 * 10**9) + b"{}")


def changed(change):
    def apply(folder: Path) -> None:
        tensors = load(folder)
        change(tensors)
        save(folder, tensors, read_config(folder))

    return apply


def first(tensors, letter="A"):
    return next(name for name in tensors if f"experts.lora_{letter}" in name)


def poison(value):
    return changed(lambda tensors: tensors[first(tensors)].__setitem__((0, 0), value))


def pickled(folder: Path) -> None:
    torch.save(load(folder), folder / "adapter_model.bin")
    (folder / NAME).unlink()


def index(folder: Path) -> None:
    (folder / NAME).unlink()
    (folder / f"{NAME}.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))


BAD = {
    "truncated": truncate,
    "wrong JSON": wrong_json,
    "key twice": twice,
    "50-GB header": big_header,
    "NaN": poison(float("nan")),
    "inf": poison(float("inf")),
    "half a pair": changed(lambda tensors: tensors.pop(first(tensors, "B"))),
    "another E": changed(
        lambda t: t.update({n: torch.cat([x, x], 0 if "_A" in n else 1) for n, x in t.items() if "experts" in n})
    ),
    "integers": changed(lambda t: t.update({n: x.to(torch.int8) for n, x in t.items() if "experts" in n})),
    "no config": lambda folder: (folder / CONFIG).unlink(),
    "no tensors": lambda folder: (folder / NAME).unlink(),
    "path trick": index,
    "pickled": pickled,
}


def run_convert(source: Path, out: Path, model: Path, *more: str):
    return CliRunner().invoke(app, ["convert", str(source), str(out), "--to", TO, "--model", str(model), *more])


def base(folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(SPEC.model()))
    return path


def assert_refused(result, folder: Path, expected: set[str]) -> None:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert {path.name for path in folder.iterdir()} == expected


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    source, model = adapter(tmp_path), base(tmp_path)
    BAD[case](source)
    assert_refused(run_convert(source, tmp_path / "out", model), tmp_path, {"in", "config.json"})
    result = run_convert(source, tmp_path / "out", model, "--json")
    assert_refused(result, tmp_path, {"in", "config.json"})
    document = json.loads(result.stdout)
    assert set(document) == {"error", "message"}
    assert document["message"]


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": [None]},
        {"target_parameters": 3},
        {"target_parameters": "experts.down_proj"},
        {"rank_pattern": ["experts"]},
        {"alpha_pattern": {"experts.down_proj": "x"}},
        {"alpha_pattern": {"(": 2}},
        {"alpha_pattern": {"a{99999999999999}": 2}},
        {"lora_alpha": 10**400},
        {"lora_alpha": True},
        {"r": 0},
        {"r": 1.5, "rank_pattern": {".*": 2}},
        {"lora_alpha": "4", "alpha_pattern": {".*": 2}},
        {"peft_version": "new"},
        {"lora_B_layout": ["grouped_by_expert"]},
        {"peft_type": "IA3"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_config_values_that_make_no_sense(tmp_path, values):
    source, model = adapter(tmp_path), base(tmp_path)
    (source / CONFIG).write_text(json.dumps({**read_config(source), **values}))
    assert_refused(run_convert(source, tmp_path / "out", model), tmp_path, {"in", "config.json"})


@pytest.mark.parametrize("shapes", [((1, 2, 8), (6, 2)), ((2, 8), (1, 6, 2)), ((3, 2, 8), (3, 6, 2)), ((8,), (6,))])
def test_a_linear_whose_factors_are_no_matrices(tmp_path, shapes):
    stem = f"{PREFIX}model.layers.0.mlp.shared_expert.up_proj"
    extra = {f"{stem}.lora_{x}.weight": torch.ones(shape) for x, shape in zip("AB", shapes, strict=True)}
    source = save_per_expert(tmp_path / "in", SPEC, SPEC.factors(("gate", "up", "down")), extra=extra)
    assert_refused(run_convert(source, tmp_path / "out", base(tmp_path)), tmp_path, {"in", "config.json"})


@pytest.mark.parametrize("role", ["up", "gate"])
def test_per_expert_factors_that_do_not_fit_together(tmp_path, role):
    """Another size of up than of gate; experts of rank 0."""
    factors = SPEC.factors(("gate", "up", "down"))
    for layer in SPEC.layers:
        A, B = factors[layer, role]
        factors[layer, role] = (A, torch.cat([B, B], 1)) if role == "up" else (A[:, :0], B[:, :, :0])
    source = save_per_expert(tmp_path / "in", SPEC, factors)
    result = run_convert(source, tmp_path / "out", base(tmp_path))
    assert_refused(result, tmp_path, {"in", "config.json"})


@pytest.mark.parametrize(
    ("experts", "kept"),
    [([3], True), ([0, 1, 2, 3], True), ([3], False)],
    ids=["one expert's beside it", "every expert's beside it", "one expert's in its place"],
)
@pytest.mark.parametrize(("old", "new"), [("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "gate_up_proj")])
def test_one_linear_in_two_spellings(tmp_path, experts, old, new, kept):
    """`verify` compared the last of them alone, and `inspect` said nothing."""
    spec = Spec()
    source = save_per_expert(tmp_path / "in", spec, spec.factors(("gate", "up", "down")))
    tensors = load(source)
    for name in [name for name in tensors if f".{old}." in name and any(f".{e}.{old}." in name for e in experts)]:
        tensors[name.replace(old, new)] = tensors[name] * 3
        if not kept:
            del tensors[name]
    twice = save(tmp_path / "twice", tensors, read_config(source))
    for run in (
        lambda: inspect_adapter(twice, model=spec.model()),
        lambda: convert_adapter(twice, tmp_path / "out", to="per-expert", model=spec.model()),
        lambda: verify_adapters(twice, source, model=spec.model()),
    ):
        with pytest.raises(PeftMoeCompatError, match=r"has two \w+ LoRA \(\w+, \w+\); one was expected"):
            run()


def test_an_adapter_of_a_dense_model_is_none_of_ours(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"model_type": "mamba", "hidden_size": 8, "intermediate_size": 6}')
    names = [f"base_model.model.layers.0.mixer.conv1d.lora_{letter}.weight" for letter in "AB"]
    tensors = dict(zip(names, (torch.randn(2, 8, 4), torch.randn(8, 2, 1)), strict=True))
    config = {**read_config(adapter(tmp_path)), "target_parameters": None, "target_modules": ["conv1d"]}
    source = save(tmp_path / "dense", tensors, {**config, "base_model_name_or_path": str(tmp_path / "base")})
    assert inspect_adapter(source).form == "none"


def test_a_base_model_without_experts(tmp_path):
    source, model = adapter(tmp_path), tmp_path / "config.json"
    model.write_text('{"model_type": "llama", "hidden_size": 8, "intermediate_size": 6}')
    assert_refused(run_convert(source, tmp_path / "out", model), tmp_path, {"in", "config.json"})


def test_the_output_must_be_new_and_apart(tmp_path):
    source, model = adapter(tmp_path), base(tmp_path)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    for out in (source, source / "out", tmp_path, tmp_path / "no" / "out", model):
        assert_refused(run_convert(source, out, model), tmp_path, {"in", "config.json"})
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b"], ids=["too long", "null byte"])
def test_paths_that_are_none(tmp_path, path):
    source, model = adapter(tmp_path), base(tmp_path)
    for arguments in ((path, tmp_path / "out", model), (source, path, model), (source, tmp_path / "out", path)):
        assert_refused(run_convert(*arguments), tmp_path, {"in", "config.json"})


def try_all(source: Path, folder: Path) -> int:
    """Whatever happens, happens as an error of this package; and after one there is no output. How much went well."""
    model, well = SPEC.model(), 0
    for call in (lambda: inspect_adapter(source), lambda: inspect_adapter(source, model=model)):
        try:
            call()
            well += 1
        except PeftMoeCompatError as error:
            assert str(error)  # noqa: PT017
    for number, to in enumerate((TO, "per-expert", "sglang", "vllm", "llama.cpp")):
        out = folder / f"out{number}"
        try:
            convert_adapter(source, out, to=to, model=model)
            well += 1
            assert out.exists()
        except PeftMoeCompatError as error:
            assert str(error)  # noqa: PT017
            assert not out.exists()
    return well


def test_all_that_is_tried_goes_well_where_nothing_is_wrong(tmp_path):
    assert try_all(adapter(tmp_path), tmp_path) == 7
    assert len(list(tmp_path.glob("out*"))) == 5


@settings(max_examples=60, deadline=None)
@given(data=st.data(), file=st.sampled_from([NAME, CONFIG]))
def test_fuzzed_bytes(data, file):
    with tempfile.TemporaryDirectory() as name:
        source = adapter(Path(name))
        raw = bytearray((source / file).read_bytes())
        header = 8 + int.from_bytes(raw[:8], "little") if file == NAME else len(raw)
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(32, 126) | st.integers(0, 255))
        (source / file).write_bytes(raw)
        try_all(source, Path(name))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**30)
    | st.floats()
    | st.text(st.characters(), max_size=4)
    | st.sampled_from(["0.18.1", "0.16.0", "x", "(", "experts.down_proj", ".*"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.just("experts.down_proj"), inner, max_size=3)
    ),
    max_leaves=4,
)
FIELDS = [
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "peft_version",
    "use_rslora", "use_dora", "peft_type", "auto_mapping", "lora_B_layout", "unsloth_fused_expert_lora",
    "base_model_name_or_path", "modules_to_save",
]  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(values=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=2), apart=st.booleans())
@example(values={"modules_to_save": True}, apart=False)
def test_fuzzed_config_values(values, apart):
    with tempfile.TemporaryDirectory() as name:
        if apart:
            source = save_per_expert(Path(name) / "in", SPEC, SPEC.factors(("gate", "up", "down")))
        else:
            source = adapter(Path(name))
        (source / CONFIG).write_text(json.dumps({**read_config(source), **values}))
        try_all(source, Path(name))
