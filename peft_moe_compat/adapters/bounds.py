"""What a file may ask for, counted before anything is made of it: far above what any model needs."""

from __future__ import annotations

from ..errors import AdapterError

__all__ = [
    "MAX_BESIDE",
    "MAX_EXPERTS",
    "MAX_EXPRESSIONS",
    "MAX_LAYERS",
    "MAX_MODULES",
    "MAX_NAME",
    "MAX_NAMES",
    "MAX_ORDERS",
    "MAX_PARTS",
    "MAX_TENSORS",
    "MAX_WHOLE",
    "require_room",
]

MAX_EXPERTS = 2**12  # of one module; the most in use are 512
MAX_MODULES = 1_000  # with experts, of one model; the most in use are 94
MAX_LAYERS = 1_000  # of one model
MAX_NAMES = 2_000  # in a list of a config, beyond one for every tensor: PEFT compares each with each
MAX_EXPRESSIONS = 256  # in a list of a config: of more than 512, Python compiles each again for every module
MAX_TENSORS = 200_000  # of one adapter; 61 layers of 384 experts, one by one, have 140,544
MAX_BESIDE = 10_000  # of them that are LoRA elsewhere than on experts; 126 layers of seven linears have 1,764
MAX_WHOLE = 50_000  # of them that are no LoRA; 48 layers of 128 experts, saved whole one by one, have 18,432
MAX_NAME = 512  # characters of a tensor's name; the longest in use have 150
MAX_PARTS = 32  # of a name, between dots; the deepest in use have 16
MAX_ORDERS = 5_000  # of parameters among wrappers, over all modules; gpt_oss has 24 in each of 36 layers
_MAX_BEYOND = 2**30


def require_room(what: str, made: int, read: int) -> None:
    """Raises `AdapterError` where `made` bytes are to come of `read` ones, and that is out of all proportion."""
    if made - read > _MAX_BEYOND:
        raise AdapterError(
            f"{what} would take {made} bytes of memory, made of {read} in the file; at most {_MAX_BEYOND} more than "
            "those are taken. Is it the config of this model, and the file undamaged?"
        )
