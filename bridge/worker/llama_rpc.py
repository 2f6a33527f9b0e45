"""Layers on other machines: ggml's RPC servers become devices of this process, to which llama.cpp gives layers.

Neither authentication nor encryption protects them (CVE-2026-34159): they belong on a private network.
"""

from __future__ import annotations

import ctypes

import llama_cpp as C

from bridge.worker.backend import LoadError

# Found by way of libllama, and so in the libggml that llama.cpp computes with. llama_cpp may have loaded that a second
# time, by another name, and what is registered there llama.cpp never sees.
_LIBRARY = C.llama_cpp._lib
_load_all = ctypes.CFUNCTYPE(None)(("ggml_backend_load_all", _LIBRARY))
_find = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(("ggml_backend_reg_by_name", _LIBRARY))
_register = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(("ggml_backend_register", _LIBRARY))
_function_of = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("ggml_backend_reg_get_proc_address", _LIBRARY)
)


def add_servers(peers: str) -> None:
    """Connects to these, HOST:PORT with commas between. Raises LoadError. One that is absent ends the process."""
    if not (backend := _find(b"RPC")):  # it may lie beside llama.cpp, or where GGML_BACKEND_PATH says
        _load_all()
        backend = _find(b"RPC")
    if not backend:
        raise LoadError("llama.cpp was built without RPC; CMAKE_ARGS=-DGGML_RPC=on brings it", "unsupported")
    address = _function_of(backend, b"ggml_backend_rpc_add_server")
    add_server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
    for peer in peers.split(","):
        server = add_server(peer.encode())
        if not server:
            raise LoadError(f"{peer} has no device to compute with")
        _register(server)
