"""How messages lie on the wire: the codec, its limits, and protocol versions."""
