"""From a socket to the one thread that owns the device, and back. Knows no torch."""
