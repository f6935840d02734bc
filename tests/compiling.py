"""How the tests' programs are compiled, in this process and in those that tests start."""

# Most of the tests' time is LLVM's: programs of a test run once, and need not be fast.
FLAGS = {"xla_backend_optimization_level": "1", "xla_llvm_disable_expensive_passes": "true"}


def xla_flags(devices=None, given=""):
    """The value of XLA_FLAGS for so many virtual CPU devices; flags that `given` has stay its."""
    flags = FLAGS | ({"xla_force_host_platform_device_count": str(devices)} if devices else {})
    missing = [f"--{name}={value}" for name, value in flags.items() if name not in given]
    return " ".join([given, *missing]).strip()
