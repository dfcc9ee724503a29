"""The pool that an engine's KV entries live in, sized once."""

import torch

from ullage import techniques
from ullage.kv.pool import KVPool
from ullage.runtime.budget import Budget
from ullage.runtime.load import TORCH_DTYPES
from ullage.runtime.memory import held_bytes
from ullage.specs.blocks import block_bytes
from ullage.specs.plan import Plan


def new_pool(plan: Plan, budget: Budget, device: torch.device) -> KVPool:
    """The budget less what is there and less the largest workspace; no larger than the plan's
    sequences need. All of these claim their part of `budget`.

    Raises:
        BudgetExceeded: what is there leaves no room for what was planned.
    """
    recipe = plan.recipe
    budget.claim("what is loaded", held_bytes(device))
    budget.claim(
        "workspace",
        max(
            phase.activation_bytes + phase.logits_bytes
            for name, phase in plan.phases.items()
            if name != "load"
        ),
    )
    model, work = recipe.model, recipe.workload
    blocks = work.sequences * techniques.sequence_blocks(recipe, work.context_tokens)
    pool_bytes = blocks * block_bytes(model, recipe.execution.kv_dtype)
    budget.claim("KV pool", pool_bytes)
    beside_bytes = plan.phases["decode"].kv_bytes - pool_bytes
    budget.claim("what techniques keep beside it", max(0, beside_bytes))
    return KVPool(blocks, model.head_dim, TORCH_DTYPES[recipe.execution.kv_dtype], device)
