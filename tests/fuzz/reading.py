"""The oracle's reading of an adapter: names by name, shapes by shape, without the package."""

from __future__ import annotations

import re
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from fuzz.oracle import PREFIX, Facts, Meaning, UnreadableError, load, lookup, rebuild, scaling

_LORA = re.compile(r"(?P<path>.+?)(?P<depth>(\.base_layer)*)\.lora_(?P<half>[AB])\.weight", re.ASCII)
_SINGLE = re.compile(r"(?P<path>.*experts)\.(?P<expert>0|[1-9][0-9]{0,5})\.(?P<linear>\w+)", re.ASCII)
_LISTED = re.compile(r"(?P<path>.*experts)\.(?P<linear>\w+_proj)s\.(?P<expert>0|[1-9][0-9]{0,5})", re.ASCII)
_NATIVE = re.compile(r"(.*experts)\.lora_(gate_and_up|up|down)_([AB])", re.ASCII)
_GGUF = re.compile(r"blk\.([0-9]+)\.ffn_(gate|up|down)_exps", re.ASCII)
_WRAPPED = re.compile(r"(?:(?<=\.)|^)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_SHARED = re.compile("shared_experts?", re.IGNORECASE)
_NAMES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
_NAMES |= {"gate_up_proj": "gate_up"} | {role: role for role in ("gate_up", "gate", "up", "down")}
_NATIVE_NAMES = {"gate_and_up": "gate_up", "up": "up", "down": "down"}


class Reading:
    """One file, read."""

    def __init__(self, folder: Path, facts: Facts, rule: str = "config") -> None:
        self.facts, self.rule = facts, rule
        try:
            self.config, self.tensors = load(folder)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise UnreadableError(str(error)) from None
        self.meaning = Meaning()
        self.names: set[str] = set()  # what the file calls its experts modules and linears
        self.ranks: dict[str, int] = {}
        self.single: dict[tuple[int, str, bool], dict[int, Tensor]] = {}
        pairs = self._completed(self._pairs())
        fused = [(path, depth) for path, depth in pairs if self._fused(path, depth)]
        for (path, depth), pair in pairs.items():
            if len(pair) != 2:
                if "expert" in _SHARED.sub("", path) or (path, depth) in fused or "blk" in path:
                    raise UnreadableError(f"half of {path}")
                self.meaning.rest |= {f"{PREFIX}{path}.lora_{half}.weight": tensor for half, tensor in pair.items()}
                continue
            if not all(self._countable(path, tensor) for tensor in pair.values()):
                raise UnreadableError(f"{path} has no numbers to count with")
            if (path, depth) in fused:
                self._add_fused(path, depth, pair["A"], pair["B"])
            else:
                self._add(path, pair["A"], pair["B"])
        for path, depth in fused:
            if depth and (path, depth - 1) not in fused:
                raise UnreadableError(f"{path} lacks a level")
        for (layer, role, listed), experts in self.single.items():
            shape = next(iter(experts.values())).shape
            if max(experts) >= facts.E or any(one.shape != shape for one in experts.values()):
                raise UnreadableError("experts that do not belong together")
            stack = torch.stack([experts.get(e, torch.zeros(shape, dtype=torch.float64)) for e in range(facts.E)])
            # ms-swift's gate_up_proj has gate, then up, in every family; linears in a list are the model's own.
            self._keep(layer, role, stack, halves=not listed)

    def _pairs(self) -> dict[tuple[str, int], dict[str, Tensor]]:
        pairs: dict[tuple[str, int], dict[str, Tensor]] = {}
        tensors = [(_WRAPPED.sub("", name), tensor) for name, tensor in self.tensors.items()]
        bare = not any(name.startswith(PREFIX) for name, _ in tensors)
        for full, tensor in tensors:
            name = self._renamed(full if bare else full.removeprefix(PREFIX))
            name = re.sub(r"\.lora_([AB])(\.(?!bias)[^.]+)??(\.weight)?$", r".lora_\1.weight", name)
            if tensor.ndim == 3 and (native := _NATIVE.fullmatch(name)):
                name = f"{native[1]}.{_NATIVE_NAMES[native[2]]}_proj.lora_{native[3]}.weight"
            found = _LORA.fullmatch(name)
            if tensor.numel() == 0 and tensor.ndim not in (2, 3) and "experts." in name and "lora" in name:
                continue  # what a writer leaves of a projection that is not there
            if found is None or (tensor.ndim not in (2, 3)):
                if "expert" in _SHARED.sub("", name) and "lora" in name:
                    raise UnreadableError(f"{name} is nothing known")
                self.meaning.rest[PREFIX + name] = tensor
                continue
            pair = pairs.setdefault((found["path"], found["depth"].count(".base_layer")), {})
            if found["half"] in pair:
                raise UnreadableError(f"two of {name}")
            pair[found["half"]] = tensor
        return pairs

    def _countable(self, path: str, tensor: Tensor) -> bool:
        if not tensor.is_floating_point() and "expert" in _SHARED.sub("", path):
            return False
        return bool((tensor if tensor.is_complex() else tensor.double()).isfinite().all())

    def _completed(self, pairs: dict[tuple[str, int], dict[str, Tensor]]) -> dict[tuple[str, int], dict[str, Tensor]]:
        """With the half that all experts share put to each expert's own."""
        shared = {path: pair for (path, _), pair in pairs.items() if len(pair) == 1 and self._single(path) is None}
        found, used = dict(pairs), set()
        for place, pair in pairs.items():
            single = self._single(place[0])
            whole = f"{single['path']}.{single['linear']}" if single else ""
            if single and whole in shared:
                half, factor = next(iter(shared[whole].items()))
                if half in pair:
                    raise UnreadableError(f"two of {place[0]}")
                if factor.ndim == 3:
                    if not factor.shape[0] or int(single["expert"]) >= factor.shape[0] > 1:
                        raise UnreadableError(f"{whole} lacks an expert")
                    factor = factor[int(single["expert"]) if factor.shape[0] > 1 else 0]
                found[place] = {**pair, half: factor}
                used.add((whole, place[1]))
        return {place: pair for place, pair in found.items() if place not in used}

    def _single(self, path: str) -> re.Match[str] | None:
        """An expert's linear."""
        return _SINGLE.fullmatch(path) or _LISTED.fullmatch(path)

    def _renamed(self, path: str, back: bool = False) -> str:
        if self.facts.rename is None:
            return path
        old, new = reversed(self.facts.rename) if back else self.facts.rename
        return re.sub(rf"(^|\.){re.escape(old)}(?=\.)", rf"\g<1>{new}", path, count=1)

    def _scaling(self, key: str, rank: int) -> float:
        return scaling(self.config, self._renamed(key, back=True), rank, self.rule)

    def _fused(self, path: str, depth: int) -> bool:
        return depth > 0 or path.endswith((".experts", ".input_linear", ".output_linear"))

    def _layer(self, path: str) -> int:
        found = re.search(r"(?:layers|blk)\.([0-9]+)\.", path)
        if found is None:
            raise UnreadableError(f"{path} is in no layer")
        return int(found[1])

    def _keep(self, layer: int, role: str, update: Tensor, halves: bool) -> None:
        facts = self.facts
        fan_in, fan_out = facts.family.size(role, facts.H, facts.I)
        if update.shape != (facts.E, fan_out, fan_in):
            raise UnreadableError(f"{role} of layer {layer} is {tuple(update.shape)}")
        parts = {role: update}
        if role == "gate_up":
            rows = facts.family.halves(fan_out)
            if halves:
                rows = {"gate": slice(0, fan_out // 2), "up": slice(fan_out // 2, None)}
            parts = {part: update[:, which] for part, which in rows.items()}
        for part, one in parts.items():
            if (layer, part) in self.meaning.experts:
                raise UnreadableError(f"two {part} in layer {layer}")
            self.meaning.experts[layer, part] = one

    def _add_fused(self, path: str, depth: int, A: Tensor, B: Tensor) -> None:
        facts, family = self.facts, self.facts.family
        layer = self._layer(path)
        places = {role: family.place(role, facts.pair[1]) for role in facts.nesting}
        here = [role for role in facts.nesting if places[role][0].rpartition(".")[2] == path.rpartition(".")[2]]
        if facts.targeted:
            targets = self.config.get("target_parameters") or ()
            here = [role for role in here if f"{path}.{places[role][1]}".endswith(tuple(targets))]
        if depth >= len(here):
            raise UnreadableError(f"{path} has LoRA on nothing known")
        role = here[len(here) - 1 - depth]  # the last is the outermost wrapper
        key = f"{path}.{places[role][1]}"
        rank = lookup(self.config, "rank_pattern", "r", self._renamed(key, back=True))
        if facts.scaled and A.ndim == 2:
            rank = A.shape[0] // facts.E
        flat = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1] == rank * facts.E
        unfolded = A.ndim == B.ndim == 3 and A.shape[:2] == (facts.E, rank)
        first, last = unfolded and B.shape[::2] == (facts.E, rank), unfolded and B.shape[1:] == (rank, facts.E)
        if [flat, first, last].count(True) != 1 or not rank:
            raise UnreadableError(f"{key}: {tuple(A.shape)}, {tuple(B.shape)} at rank {rank}")
        if flat:
            update = rebuild(A, B, facts.E, facts.orientation, facts.packing)
        else:
            update = (B if first else B.permute(2, 0, 1)).double() @ A.double()
        update = update * self._scaling(key, rank)
        self.names.add(path)
        self.ranks[key] = rank
        self._keep(layer, role, update, halves=False)

    def _add(self, path: str, A: Tensor, B: Tensor) -> None:
        gguf, single = _GGUF.fullmatch(path), self._single(path)
        module, _, last = path.rpartition(".")
        last = single["linear"] if single else last
        role = gguf[2] if gguf else _NAMES.get(last)
        if role in ("gate_up", "gate", "up") and not self.facts.family.gated:
            role = "up"
        if A.ndim == 3 or (role and module.endswith(".experts")):
            if role is None or not (gguf or module.endswith("experts")):
                raise UnreadableError(f"{path} is nothing known")
            self._add_stack(path, role, A, B)
        elif single:
            if B.ndim != 2 or A.shape[0] != B.shape[1] or not A.shape[0] or role is None:
                raise UnreadableError(f"{path}: {tuple(A.shape)}, {tuple(B.shape)}")
            update = (B.double() @ A.double()) * self._scaling(path, A.shape[0])
            self.names.add(f"{single['path']}.{single['linear']}")
            self.ranks[path] = A.shape[0]
            place = self._layer(path), role, _LISTED.fullmatch(path) is not None
            self.single.setdefault(place, {})[int(single["expert"])] = update
        elif re.search(r"(^|\.)(\w*experts?)(\.|$)", _SHARED.sub("", path)):
            raise UnreadableError(f"{path} is nothing known")
        else:
            self._add_linear(path, A, B)

    def _add_stack(self, path: str, role: str, A: Tensor, B: Tensor) -> None:
        facts = self.facts
        fan_in, fan_out = facts.family.size(role, facts.H, facts.I)
        if A.ndim == B.ndim:  # a matrix, or a stack of one, is for all experts
            A, B = (one.expand(facts.E, -1, -1) if one.ndim == 2 or one.shape[0] == 1 else one for one in (A, B))
        if A.ndim == B.ndim == 3 and (
            A.shape[1:] != (B.shape[2], fan_in) or (facts.transposed and A.shape[1:] == (fan_in, B.shape[1]))
        ):
            A, B = A.transpose(1, 2), B.transpose(1, 2)
        fits = A.ndim == B.ndim == 3 and A.shape[0] == B.shape[0] == facts.E and A.shape[1] == B.shape[2]
        if not fits or not A.shape[1] or (A.shape[2], B.shape[1]) != (fan_in, fan_out):
            raise UnreadableError(f"{path}: {tuple(A.shape)}, {tuple(B.shape)}")
        update = (B.double() @ A.double()) * self._scaling(path, A.shape[1])
        self.names.add(path)
        self.ranks[path] = A.shape[1]
        self._keep(self._layer(path), role, update, halves=False)

    def _add_linear(self, path: str, A: Tensor, B: Tensor) -> None:
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not A.shape[0]:
            raise UnreadableError(f"{path}: {tuple(A.shape)}, {tuple(B.shape)}")
        key = here = self._renamed(path, back=True)
        for target in self.config.get("target_parameters") or ():
            owner, _, parameter = target.rpartition(".")
            if owner and (here == owner or here.endswith(f".{owner}")):
                key = f"{here}.{parameter}"
        self.ranks[path] = A.shape[0]
        factor = self._scaling(key, A.shape[0])
        self.meaning.linears[path] = (B.double() @ A.double()) * factor


def read(folder: Path, facts: Facts, rule: str = "config") -> Meaning:
    """What the adapter in a folder does.

    Raises:
        UnreadableError: Nothing in particular.
    """
    try:
        return Reading(folder, facts, rule).meaning
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise UnreadableError(f"{type(error).__name__}: {error}") from None
