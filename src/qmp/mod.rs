//! QMP: bytes to commands and back.
