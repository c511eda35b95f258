"""Flags with which XLA compiles fast and optimises nothing, for programs that run for moments only.

jax 0.10 has two generators of code for CPUs, of which the older one takes half the time.
"""

import jax

_FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if jax.__version_info__ < (0, 11):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
FLAGS = " ".join(_FLAGS)
