"""LoRA for any JAX function: a transform of parameter trees.

Importing this package loads jax and nothing heavier; `jlora.models`, `jlora.peft` and the other
modules load on first use of the name.
"""
