"""A process that owns one model. It knows no sockets and no wire: frames come in, frames go out (``bridge.ipc``)."""
