"""What differs between decoders: sizes, and the variants of attention, norms and MLP.

A family of models is a choice of these fields, made in `hf_config.py`; the decoder asks for fields,
never for families.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from jlora.models import remat
from jlora.models.rotary import RopeScaling

__all__ = ["DecoderConfig", "Experts"]


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of each layer's MLP.

    Attributes:
      count: MLPs in a layer.
      per_token: how many of them a token goes through, those that its router scores highest.
      renormalize: whether the weights of a token's experts are divided by their sum.
    """

    count: int
    per_token: int
    renormalize: bool = True

    def __post_init__(self):
        if not 1 <= self.per_token <= self.count:
            raise ValueError(
                f"per_token must be from 1 to the {self.count} experts, got {self.per_token}."
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder and how it computes.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width inside the MLP, or inside each expert.
      num_layers: decoder layers.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`.
      head_dim: width of one head.
      max_positions: tokens the model was made for; kept for files, not enforced.
      rms_norm_eps: added to the mean square.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None or how they are stretched.
      local_rope_theta: base of the frequencies in sliding layers, not stretched; None for the same
        frequencies everywhere.
      rotary_factor: share of each head that is rotated.
      sliding_window: tokens that a sliding layer sees, itself included; None for all.
      sliding_layers: which layers slide, if not all do.
      query_scalar: scores are divided by its square root; None for `head_dim`.
      attention_softcap: scores are bounded to this by a tanh, or None.
      logit_softcap: likewise for the final logits.
      qk_norm: whether each head of queries and keys is normalised before it is rotated.
      qkv_bias: whether q, k and v projections add a bias.
      o_bias: whether the attention's output projection adds a bias.
      mlp_bias: whether the MLP's projections add a bias.
      fused_projections: whether q, k and v are one projection, and gate and up one.
      activation: of the gate.
      experts: None for an MLP.
      zero_centered_norms: whether norms scale by `1 + scale`, and do so in float32.
      post_norms: whether the outputs of attention and MLP are normalised too.
      scale_embeddings: whether token vectors are multiplied by the square root of `hidden_size`.
      tie_embeddings: whether the head is the embedding's transpose.
      dtype: of activations and products; statistics, softmax and logits are float32.
      remat: what the backward pass computes again, a name in `remat.POLICIES` or "keep:...".
      unroll: layers in one iteration of the loop over them. With all of them there is no loop: the
        program is faster, because nothing is copied into stacks, and compiles for longer.
      family: the architecture's name in files, e.g. "llama"; see `hf_config.py`.
      bos_token_id: kept for files.
      eos_token_ids: kept for files.
      pad_token_id: kept for files.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    rotary_factor: float = 1.0
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    query_scalar: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused_projections: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    experts: Experts | None = None
    zero_centered_norms: bool = False
    post_norms: bool = False
    scale_embeddings: bool = False
    tie_embeddings: bool = False
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    family: str = "llama"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
                      "unroll"):  # fmt: skip
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}.")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}.")
        if not 0 < self.rotary_factor <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                "rotary_factor must be in (0, 1] and leave an even part of each head, got "
                f"{self.rotary_factor} of {self.head_dim}."
            )
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation must be 'silu' or 'gelu_tanh', got {self.activation!r}.")
        remat.check(self.remat)
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.rotary_dim)
        self._settle_windows()

    def _settle_windows(self):
        """Gives configs that compute the same one form: no pattern where all layers are alike."""
        window, slides = self.sliding_window, tuple(bool(x) for x in self.sliding_layers)
        if window is not None and window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {window}.")
        if slides and len(slides) != self.num_layers:
            raise ValueError(
                f"sliding_layers must have one entry for each of {self.num_layers} layers, got "
                f"{len(slides)}."
            )
        if any(slides) and window is None:
            raise ValueError("sliding_layers needs a sliding_window.")
        if slides and not any(slides):
            object.__setattr__(self, "sliding_window", None)
        alike = len(set(slides)) <= 1
        object.__setattr__(self, "sliding_layers", () if alike else slides)

    @property
    def rotary_dim(self) -> int:
        """Entries of each head that are rotated."""
        return int(self.head_dim * self.rotary_factor)

    @property
    def slides(self) -> tuple[bool, ...]:
        """Whether each layer slides."""
        return self.sliding_layers or (self.sliding_window is not None,) * self.num_layers
