"""An SO-101 without the hardware: servo bus, physics, cameras and scripted experts."""

from virtual_so101.gl import prefer_offscreen

# Before anything here imports MuJoCo, which asks for a display otherwise.
prefer_offscreen()
