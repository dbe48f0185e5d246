"""C++ kernels for the CPU: compiled on first use with the compiler that is there, kept in a cache, called by ctypes."""

from taipan.native.library import NativeStatus, call, invoke, native_available, native_status

__all__ = ["NativeStatus", "call", "invoke", "native_available", "native_status"]
