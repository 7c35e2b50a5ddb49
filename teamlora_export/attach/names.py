"""What a name says: which layer, and which projection of it.

Exporters name nodes and weights after modules, each in its own way: `/model/layers.3/attn/q_proj/MatMul_Q4`,
`model.layers.3.self_attn.q_proj.weight`, `/h.3/attn/c_attn/Gemm`. The first number is the layer; what follows up to
the operator is the module; `onnx::MatMul_123` says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Where the module ends and the operator or the tensor begins. A module may begin like an operator (`add_q_proj`).
_END = re.compile(
    r"(?i:(fused)?(matmul|gemm|(de)?quantizelinear))([_A-Z0-9]\w*)?"
    r"|(Add|Mul|Cast|Transpose|Reshape|Split|Constant)([_A-Z0-9]\w*)?"
    r"|(?i:add|mul|cast|transpose|reshape|split|constant)(?i:_(\d+|to|output|quant\w*|b?fp?\d+|float\d*))*"
    r"|(?i:(q?weight|q?bias|scales?|q?zeros|zero_points?|g_idx)(_\w+)?|output_\d+|quant|\w+_output_\d+)"
)
# What tells the towers of a model apart, by words in front of the layer; a name is of one of each line at most.
_TOWERS = (
    {
        "vision": re.compile("vision|visual|image"),
        "audio": re.compile("audio|speech"),
        "text": re.compile("text|language"),
    },
    {"encoder": re.compile("^encoder$"), "decoder": re.compile("^decoder$")},
)
_IGNORED = {"base_layer", "base_model", "default"}
_ATTENTION = {"attn", "self_attn", "attention", "self_attention", "self", "selfattention", "multi_head_attention"}
_MIXTURES = {"experts", "block_sparse_moe", "moe", "shared_expert", "shared_experts"}
# What the words of `Key` may be, but for those of modules of other kinds.
ROLES = ("q", "k", "v", "o", "gate", "up", "down", "fc1", "fc2", "qkv", "gate_up")
# What a module's last word stands for; a word that stands for two depends on whether it belongs to the attention.
_ROLES = {
    **dict.fromkeys(("q_proj", "query", "q", "wq", "q_lin", "query_proj"), ("q",)),
    **dict.fromkeys(("k_proj", "key", "k", "wk", "k_lin", "key_proj"), ("k",)),
    **dict.fromkeys(("v_proj", "value", "v", "wv", "v_lin", "value_proj"), ("v",)),
    **dict.fromkeys(("qkv_proj", "c_attn", "qkv"), ("q", "k", "v")),
    # Head by head, group by group, or as some models of these names have it: nothing to be taken apart.
    **dict.fromkeys(("query_key_value", "wqkv"), ("qkv",)),
    **dict.fromkeys(("o_proj", "out_proj", "out_lin", "o"), ("o",)),
    **dict.fromkeys(("gate_proj", "w1"), ("gate",)),
    **dict.fromkeys(("up_proj", "w3"), ("up",)),
    **dict.fromkeys(("down_proj", "w2"), ("down",)),
    "gate_up_proj": ("gate", "up"),
    **dict.fromkeys(("fc1", "c_fc", "dense_h_to_4h", "fc_in"), ("fc1",)),
    **dict.fromkeys(("fc2", "dense_4h_to_h", "fc_out"), ("fc2",)),
}
_IN_ATTENTION = {"dense": ("o",), "c_proj": ("o",), "wo": ("o",)}
_OUTSIDE = {"c_proj": ("fc2",)}


@dataclass(frozen=True)
class Key:
    """A projection of a model.

    Attributes:
        layer: its number; None for what belongs to none (the head).
        roles: what it does, one of `ROLES`; several where they are packed side by side in this
            order; or the words of its own name, in one.
    """

    layer: int | None
    roles: tuple[str, ...]

    def __str__(self) -> str:
        place = "" if self.layer is None else f" of layer {self.layer}"
        return "+".join(self.roles) + place


def key_of(name: str) -> Key | None:
    """What a node's, weight's or module's name says; None where that is nothing."""
    words, number = _split(name)
    tail = words if number is None else words[number + 1 :]
    end = next((index for index, word in enumerate(tail) if _END.fullmatch(word)), len(tail))
    tail = [word.lower() for word in tail[:end]]
    if not tail:
        return None
    return Key(None, (".".join(tail),)) if number is None else Key(int(words[number]), _roles(tail))


def keys_of(names: Iterable[str]) -> set[Key]:
    """What several names of one thing say; those without a layer count where no other has one."""
    keys = {key for name in names if (key := key_of(name)) is not None}
    return {key for key in keys if key.layer is not None} or keys


def towers_of(names: Iterable[str]) -> frozenset[str]:
    """Which parts of a model of several the names of one thing say it is in."""
    found = set()
    for name in names:
        words, number = _split(name)
        for kinds in _TOWERS:
            found |= {
                kind for kind, said in kinds.items() if any(said.search(word.lower()) for word in words[: number or 0])
            }
    return frozenset(found)


def are_apart(left: frozenset[str], right: frozenset[str]) -> bool:
    """Whether two things are in different parts of a model, as far as both say it."""
    sides = ((left & kinds.keys(), right & kinds.keys()) for kinds in _TOWERS)
    return any(ours and theirs and not ours & theirs for ours, theirs in sides)


def is_outside(path: str) -> bool:
    """Whether a module is in none of the layers."""
    key = key_of(path)
    return key is None or key.layer is None


def _split(name: str) -> tuple[list[str], int | None]:
    """The words of a name, and which of them is the layer's number."""
    words = [word for word in re.split(r"[/.]|::", name.strip()) if word and word not in _IGNORED]
    return words, next((index for index, word in enumerate(words) if word.isdecimal()), None)


def _roles(tail: list[str]) -> tuple[str, ...]:
    own = (".".join(tail),)
    if any(word.isdecimal() or word in _MIXTURES for word in tail):
        # Each expert of a mixture has projections of these names.
        return own
    in_attention = any(word in _ATTENTION for word in tail[:-1])
    if tail[-1] == "dense" and not in_attention:
        return {"intermediate": ("fc1",), "output": ("fc2",)}.get(tail[-2] if len(tail) > 1 else "", own)
    return (_IN_ATTENTION if in_attention else _OUTSIDE).get(tail[-1]) or _ROLES.get(tail[-1], own)
