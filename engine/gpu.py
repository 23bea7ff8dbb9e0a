"""The GPU before torch is there: its driver is slow to start, and waits for nothing that Python does."""

import ctypes
import threading


def wake_gpu() -> None:
    """Begin to make this process's context on the GPU, which torch will find: it takes about as long as its import."""
    threading.Thread(target=_make_context, name="waking the GPU", daemon=True).start()


def _make_context() -> None:
    """Does nothing where there is no GPU: who needs one says so."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
