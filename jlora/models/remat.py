"""What the backward pass of a layer computes again, by name.

Every policy keeps each layer's input, which the loop over layers hands on. The decoder gives names
to what a policy may keep besides, with `checkpoint_name`.
"""

from typing import Any

import jax

__all__ = ["POLICIES", "PROJECTION"]

PROJECTION = "projection"  # the output of each projection

_keep = jax.checkpoint_policies.save_only_these_names

# Less memory and more work downwards.
POLICIES: dict[str, Any] = {
    "none": None,  # nothing is computed again, and no policy asked
    "dots": _keep(PROJECTION),
    "full": jax.checkpoint_policies.nothing_saveable,
}
