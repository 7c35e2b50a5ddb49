"""The reference layer, written to be read beside the paper (TeamLoRA, arXiv 2408.09856, section 3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from teamlora_export.adapter.spec import ExpertProjection


class FrozenLinear(nn.Module):
    """A linear layer that owns `nn.Linear`'s or `Conv1D`'s own parameters, under their own names.

    Adapted layers derive from it, so that an adapted model keeps the parameter names of its base.

    Attributes:
        weight: [out, in], or [in, out] where `transposed` (`transformers.pytorch_utils.Conv1D`).
        bias: [out] or None.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.weight: nn.Parameter = linear.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = linear.bias  # type: ignore[assignment]
        self.transposed = not isinstance(linear, nn.Linear)
        out_in = self.weight.shape[::-1] if self.transposed else self.weight.shape
        self.out_features, self.in_features = int(out_in[0]), int(out_in[1])

    def base_projection(self, x: Tensor) -> Tensor:
        """x [.., in] -> [.., out], as the base computes it."""
        return nn.functional.linear(x, self.weight.T if self.transposed else self.weight, self.bias)


class ExpertLinear(FrozenLinear):
    """A frozen linear layer with a team of low-rank experts, mixed anew for every token.

        p = softmax(x Rt)                                    [.., k]
        w = p + p M;  w = routing_sum * w / sum(w)           [.., k]
        u = (x At) * scaling                                 [.., a]
        y = x Wt + b + sum_i w_i (u_i Bit)                   [.., out]

    Routing runs in float32 at least, as in the exported op. `forward` returns y alone; the routing weights of the last
    call stay in `last_routing` for training losses and reports.

    Attributes:
        down: A, [a, in].  router: R, [k, in].  interaction: M, [k, k].  up: the B_i, [k, out, c].
        last_routing: w of the last forward, [.., k], in the autograd graph while training.
    """

    def __init__(
        self, linear: nn.Module, projection: ExpertProjection, dropout: float = 0.0, dtype: torch.dtype | None = None
    ) -> None:
        """`dtype`: of the adapter's own tensors. Default: the linear layer's."""
        super().__init__(linear)
        dtype, device = dtype or self.weight.dtype, self.weight.device
        self.scaling = projection.scaling
        self.routing_sum = projection.routing_sum
        self.shared_down = projection.shared_down
        self.dropout = nn.Dropout(dropout)
        self.down = _parameter(projection.down, dtype, device)
        self.router = _parameter(projection.router, dtype, device)
        self.interaction = _parameter(projection.interaction, torch.promote_types(dtype, torch.float32), device)
        ups = [_parameter(up, dtype, device) for up in projection.ups]
        self.up = nn.Parameter(torch.stack([up.detach() for up in ups]))
        self.last_routing: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.contributions(x), start=self.base_projection(x))

    def contributions(self, x: Tensor) -> Iterator[Tensor]:
        """x [.., in] -> what each expert adds to the base's projection, w_i (u_i Bit), [.., out] each."""
        w = self.route(x)
        self.last_routing = w if self.training else w.detach()
        u = nn.functional.linear(self.dropout(x), self.down) * self.scaling
        for i, (w_i, u_i) in enumerate(zip(w.to(u.dtype).split(1, dim=-1), self.expert_inputs(u), strict=True)):
            yield w_i * nn.functional.linear(u_i, self.up[i])

    def route(self, x: Tensor) -> Tensor:
        """x [.., in] -> routing weights [.., k] that sum to `routing_sum`."""
        logits = nn.functional.linear(x, self.router).to(self.interaction.dtype)
        p = torch.softmax(logits, dim=-1)
        w = p + p @ self.interaction
        return self.routing_sum * w / w.sum(dim=-1, keepdim=True)

    def expert_inputs(self, u: Tensor) -> tuple[Tensor, ...]:
        """u [.., a] -> what each of the k experts reads, [.., c] each."""
        num_experts = self.up.shape[0]
        return (u,) * num_experts if self.shared_down else u.chunk(num_experts, dim=-1)


def _parameter(array, dtype: torch.dtype, device: torch.device) -> nn.Parameter:  # type: ignore[no-untyped-def]
    """An array of any checkpoint dtype (bfloat16 included, which NumPy hands over by way of float32)."""
    widened = array if array.dtype.itemsize > 2 else array.astype("float32")
    return nn.Parameter(torch.tensor(widened, dtype=dtype, device=device))
