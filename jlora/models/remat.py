"""What the backward pass of a layer computes again, by name.

The input of each layer is kept, since the loop over layers hands it on, and a policy keeps more:
fewer products are done twice and more memory is taken. `keep:` and names, such as
"keep:attention,q_proj,k_proj,v_proj", fits what is kept to the memory there is.
"""

from collections.abc import Callable
from typing import Any

import jax

__all__ = ["ATTENTION", "LAYER_INPUT", "POLICIES", "check", "policy", "wrap"]

# What the decoder names with `checkpoint_name`, besides the output of each projection.
LAYER_INPUT = "layer_input"
ATTENTION = "attention"

_PROJECTIONS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj",
    "down_proj", "gate",
)  # fmt: skip
_NAMES = (ATTENTION, *_PROJECTIONS)

Policy = Callable[..., Any]


def _keep(*names: str) -> Policy:
    named = jax.checkpoint_policies.save_only_these_names(*names)
    if ATTENTION not in names:
        return named

    def saveable(primitive: Any, *args: Any, **params: Any) -> Any:
        # cuDNN's forward pass gives the output and the softmax's statistics, which its backward
        # pass reads: with both kept it is not run again.
        flash = primitive.name.startswith("dot_product_attention_fwd")
        return flash or named(primitive, *args, **params)

    return saveable


def _offload(*names: str) -> Policy:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT, *names],
        offload_src="device",
        offload_dst="pinned_host",
    )


POLICIES: dict[str, Policy | None] = {
    # keeps whatever the backward pass reads
    "none": None,
    # all projections: only norms, activations and attention are done again
    "dots": _keep(*_PROJECTIONS),
    # what attention gives, which costs most to compute again where rows are long
    "attention": _keep(ATTENTION),
    # nothing
    "full": jax.checkpoint_policies.nothing_saveable,
    # nothing, and layers' inputs are in the host's memory meanwhile
    "offload": _offload(),
}


def policy(name: str) -> Policy | None:
    """The policy for `jax.checkpoint`, or None for none at all.

    Raises:
      ValueError: if there is none of that name.
    """
    check(name)
    if name in POLICIES:
        return POLICIES[name]
    return _offload(*_named(name)) if name.startswith("offload:") else _keep(*_named(name))


def check(name: str) -> None:
    """Raises ValueError if no policy has this name."""
    if name in POLICIES:
        return
    if not name.startswith(("keep:", "offload:")) or not set(_named(name)) <= set(_NAMES):
        raise ValueError(
            f"remat must be one of {list(POLICIES)}, or 'keep:' or 'offload:' and names of "
            f"{list(_NAMES)} with commas between, got {name!r}."
        )


def _named(name: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in name.split(":")[1].split(","))


def wrap(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`fn` with the policy of this name, for use outside of a loop."""
    if name == "none":
        return fn
    # Outside of a loop XLA would merge what is computed again with the first time.
    return jax.checkpoint(fn, policy=policy(name), prevent_cse=True)
