"""The op on tensors: by our kernels, by PyTorch as one would write it, as two plain products, and in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_check.kernels import Kernels, Sizes, Tuning
from gpu_check.machine import Machine

# Digits of the significand, with the hidden one.
_DIGITS = {"fp32": 24, "fp16": 11, "bf16": 8}


@dataclass(frozen=True)
class Call:
    """The tensors of one call, on the machine: x [tokens, in], base and y [tokens, O], down [G (a + k), in],
    mix [G, k, k] in float32, up [k c, O]. v [tokens, G, k c] is what the second plain product reads."""

    sizes: Sizes
    x: Any
    base: Any
    down: Any
    mix: Any
    up: Any
    y: Any
    v: Any

    def tensors(self) -> tuple[Any, ...]:
        return self.x, self.base, self.down, self.mix, self.up, self.y


def make_call(torch: Any, machine: Machine, sizes: Sizes, seed: int = 0) -> Call:
    """Random tensors whose sums are of the size that a model's are."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[sizes.dtype]
    generator = torch.Generator(machine.device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, of: Any = dtype) -> Any:
        return (scale * torch.randn(*shape, generator=generator, device=machine.device)).to(of)

    k, siblings = sizes.experts, len(sizes.outs)
    eye = torch.eye(k, device=machine.device)
    return Call(
        sizes,
        x=normal(sizes.tokens, sizes.inputs),
        base=normal(sizes.tokens, sizes.out),
        down=normal(sizes.rows, sizes.inputs, scale=sizes.inputs**-0.5),
        mix=(eye + normal(siblings, k, k, scale=0.3 / k, of=torch.float32)).contiguous(),
        up=normal(sizes.up_rank, sizes.out, scale=sizes.up_rank**-0.5),
        y=torch.full((sizes.tokens, sizes.out), float("nan"), dtype=dtype, device=machine.device),
        v=normal(sizes.tokens, siblings, sizes.up_rank),
    )


def ours(torch: Any, machine: Machine, kernels: Kernels, call: Call, tuning: Tuning) -> Callable[[], None]:
    """A function that enqueues the op on our kernels."""
    return enqueued(torch, machine, kernels, call.sizes, tuning, call.tensors())


def enqueued(
    torch: Any, machine: Machine, kernels: Kernels, sizes: Sizes, tuning: Tuning, tensors: Sequence[Any]
) -> Callable[[], None]:
    """As `ours`, of tensors that the caller keeps: x, base, down, mix, up, y, and the rows' indices of version 2."""
    size = max(kernels.workspace_bytes(sizes, tuning), 256)
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=machine.device)
    # The emulation's memory is a CPU's, which PyTorch aligns to 64 bytes: as much as the kernels use.
    pointers = [tensor.data_ptr() for tensor in tensors]

    def run() -> None:
        kernels.launch(sizes, tuning, pointers, workspace.data_ptr(), machine.stream())

    return run


def by_pytorch(torch: Any, call: Call) -> Any:
    """y, by the op's definition in PyTorch's operators."""
    return definition(torch, call.sizes, *call.tensors()[:5])


def definition(torch: Any, sizes: Sizes, x: Any, base: Any, down: Any, mix: Any, up: Any) -> Any:
    """y, as one would write it."""
    outputs, first = [], 0
    z = (x @ down.T).view(sizes.tokens, len(sizes.outs), sizes.sibling_rows)
    for sibling, width in enumerate(sizes.outs):
        u, logits = z[:, sibling, : sizes.down_rank], z[:, sibling, sizes.down_rank :].float()
        mixed = torch.exp(logits - logits.amax(-1, keepdim=True)) @ mix[sibling]
        weights = mixed / mixed.sum(-1, keepdim=True)
        u = u.view(sizes.tokens, -1, sizes.expert_rank)
        v = (weights[:, :, None] * u.float()).to(x.dtype).view(sizes.tokens, sizes.up_rank)
        columns = slice(first, first + width)
        outputs.append(base[:, columns] + v @ up[:, columns])
        first += width
    return torch.cat(outputs, dim=1)


def two_products(torch: Any, call: Call) -> Callable[[], None]:
    """A function that enqueues the two products alone, as cuBLAS makes them: no router, and what is between them is
    there already. The second is one product for each sibling, and adds `base`."""
    z = call.x @ call.down.T
    columns, first = [], 0
    for width in call.sizes.outs:
        columns.append(slice(first, first + width))
        first += width
    outputs = [torch.empty_like(call.base[:, one].contiguous()) for one in columns]
    bases = [call.base[:, one].contiguous() for one in columns]
    ups = [call.up[:, one].contiguous() for one in columns]

    def run() -> None:
        torch.mm(call.x, call.down.T, out=z)
        for sibling, output in enumerate(outputs):
            torch.addmm(bases[sibling], call.v[:, sibling], ups[sibling], out=output)

    return run


def difference(torch: Any, call: Call) -> float:
    """The largest |y - definition in float64|, over what rounding may do: at most 1, or NaN, where y is wrong.

    z, v and y are rounded to the dtype as the definition says. A sum that float32 makes can fall on the other side of
    a border between two numbers; what that changes, a unit in the last place of each z and v, is allowed for, and so
    is float32's own error.
    """
    sizes, first, worst = call.sizes, 0, 0.0
    unit = 2.0 ** (1 - _DIGITS[sizes.dtype])
    dtype = call.x.dtype
    single = 2.0**-23 * (sizes.inputs**0.5 + 8)
    z_sum = call.x.double() @ call.down.double().T
    z_size = call.x.double().abs() @ call.down.double().abs().T
    z = z_sum.to(dtype).double()
    z_error = unit * z.abs() + single * z_size
    z, z_error = (part.view(sizes.tokens, len(sizes.outs), sizes.sibling_rows) for part in (z, z_error))
    for sibling, width in enumerate(sizes.outs):
        u, u_error = z[:, sibling, : sizes.down_rank], z_error[:, sibling, : sizes.down_rank]
        logits, logit_error = z[:, sibling, sizes.down_rank :], z_error[:, sibling, sizes.down_rank :]
        mixed = torch.exp(logits - logits.amax(-1, keepdim=True)) @ call.mix[sibling].double()
        weights = mixed / mixed.sum(-1, keepdim=True)
        # Of normalised exponentials, twice the logits' error each way; the interaction is near the identity.
        relative = 4 * logit_error.amax(-1, keepdim=True) + 64 * 2.0**-24
        blocks = (sizes.tokens, -1, sizes.expert_rank)
        u, u_error = u.reshape(blocks), u_error.reshape(blocks)
        v = (weights[:, :, None] * u).to(dtype).double()
        v_error = unit * v.abs() + weights[:, :, None].abs() * (u_error + relative[:, :, None] * u.abs())
        v, v_error = (part.reshape(sizes.tokens, sizes.up_rank) for part in (v, v_error))
        columns = slice(first, first + width)
        up, base = call.up[:, columns].double(), call.base[:, columns].double()
        expected = base + v @ up
        allowed = v_error @ up.abs() + unit * expected.abs() + single * (base.abs() + v.abs() @ up.abs())
        ratio = ((call.y[:, columns].double() - expected).abs() / allowed).amax()
        # NaN stays.
        worst = float(ratio) if not float(ratio) <= worst else worst
        first += width
    return worst
