"""What 8-bit base products do to influence scores: `precision="fp8"` beside emulations, on a small model, in seconds.

    python -m benches.fp8_effect [--examples 48]

In the emulations, operands of every frozen base product are rounded to fp8 and multiplied in fp32, as fp8 tensor cores
do up to the order of the sums: x and W to e4m3, the output gradient to e5m2 or e4m3, each row by its own scale
(max|row| to the largest number of the format). LoRA products, norms, attention and the head stay as they are.
`precision="fp8"` is the package's own path (gradients e4m3); its distance from its emulation is given too. The scores
are gradient products of training and query examples; the comparison is Spearman's rank correlation with the scores of
fp32 products, a query at a time. bf16 rounding of the same operands stands beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benches.environment import describe
from benches.models import qwen2_model, with_lora
from influence_fast.gradients.per_example import per_example_gradients
from influence_fast.statistics.ranks import spearman

VOCABULARY, LENGTH = 128, 48
OURS, ITS_EMULATION = "precision fp8", "fp8, gradients e4m3"
Rounding = Callable[[Tensor], Tensor]


def fp8(dtype: torch.dtype) -> Rounding:
    """Rounds rows (last dimension) to `dtype` by a scale of their own, and gives them back in fp32."""
    largest = torch.finfo(dtype).max

    def rounded(rows: Tensor) -> Tensor:
        scale = rows.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / largest
        return (rows / scale).to(dtype).float() * scale

    return rounded


def bf16(rows: Tensor) -> Tensor:
    """Rounds to bf16 and back."""
    return rows.bfloat16().float()


class RoundedLinear(torch.autograd.Function):
    """x W^T and g W from rounded operands; the frozen W gets no gradient.

    For g W the rows that share a scale are those of W^T: a product can take scales out of its sum only along the
    dimensions that are left.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, operand: Rounding, grad: Rounding) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.operand, ctx.grad = operand, grad
        return torch.nn.functional.linear(operand(x), operand(weight), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return ctx.grad(grads[0]) @ ctx.operand(weight.T).T, None, None, None, None


def markov(examples: int, seed: int) -> Tensor:
    """Token sequences [examples, LENGTH] of one fixed random chain with few successors a token: there is much to learn,
    and examples differ."""
    chain = torch.Generator().manual_seed(0)
    successors = torch.randint(0, VOCABULARY, (VOCABULARY, 3), generator=chain)
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, VOCABULARY, (examples,), generator=generator)]
    for _ in range(LENGTH - 1):
        choice = torch.randint(0, 3, (examples,), generator=generator)
        tokens.append(successors[tokens[-1], choice])
    return torch.stack(tokens, dim=1)


def trained_model(steps: int = 60) -> Any:
    """A 2-layer Qwen2-shaped model that has learnt part of the chain, with a LoRA adapter of rank 8."""
    torch.manual_seed(0)
    model = qwen2_model(VOCABULARY, layers=2, width=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        batch = markov(16, seed=1000 + step)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return with_lora(model.eval(), 8)


def gradients(model: Any, examples: Tensor, roundings: tuple[Rounding, Rounding] | None) -> Tensor:
    """[E, k]: exact LoRA gradients, one backward an example; base products rounded where `roundings` are given."""
    from peft.tuners.lora import Linear

    layers = [module.base_layer for module in model.modules() if isinstance(module, Linear)]
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    try:
        for layer in layers if roundings else []:
            layer.forward = lambda x, layer=layer: RoundedLinear.apply(x, layer.weight, layer.bias, *roundings)
        rows = []
        for example in examples:
            loss = model(input_ids=example[None], labels=example[None]).loss
            rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, factors)]))
        return torch.stack(rows)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def ours(model: Any, examples: Tensor) -> Tensor:
    """[E, k]: the same rows by the package's own 8-bit path."""
    return per_example_gradients(model, [{"input_ids": e, "labels": e} for e in examples], precision="fp8")


def error(rows: Tensor, exact: Tensor) -> float:
    """Relative norm of the difference of rows [E, k], mean over the rows."""
    return float(((rows - exact).norm(dim=1) / exact.norm(dim=1)).mean())


def effect(model: Any, train: Tensor, queries: Tensor) -> dict[str, dict[str, float]]:
    """Of each way: relative error of the gradients, and the rank correlation of the scores, mean and least; of the real
    path also how far its gradients are from its emulation's."""
    e4m3, e5m2 = fp8(torch.float8_e4m3fn), fp8(torch.float8_e5m2)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "bf16": lambda examples: gradients(model, examples, (bf16, bf16)),
        "fp8, gradients e5m2": lambda examples: gradients(model, examples, (e4m3, e5m2)),
        ITS_EMULATION: lambda examples: gradients(model, examples, (e4m3, e4m3)),
        OURS: lambda examples: ours(model, examples),
    }
    exact, exact_queries = gradients(model, train, None), gradients(model, queries, None)
    truth = exact @ exact_queries.T
    found, made = {}, {}
    for name, way in ways.items():
        rows, query_rows = way(train), way(queries)
        made[name] = rows
        scores = rows @ query_rows.T
        ranks = [spearman(scores[:, q].double().numpy(), truth[:, q].double().numpy()) for q in range(len(queries))]
        found[name] = {
            "gradient error": error(rows, exact),
            "rank correlation": sum(ranks) / len(ranks),
            "least of the queries": min(ranks),
            "mean score": spearman(scores.mean(1).double().numpy(), truth.mean(1).double().numpy()),
        }
    found[OURS]["from its emulation"] = error(made[OURS], made[ITS_EMULATION])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=48, help="training examples that are scored")
    args = parser.parse_args()
    found = effect(trained_model(), markov(args.examples, seed=1), markov(8, seed=2))
    for name, figures in found.items():
        print(f"{name:<22}" + "  ".join(f"{key} {value:.4f}" for key, value in figures.items()))
    print(json.dumps({"effect": found, **describe()}))


if __name__ == "__main__":
    main()
