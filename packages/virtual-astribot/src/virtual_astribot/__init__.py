"""A stand-in for the Astribot S1 and its SDK, without the hardware. Not the vendor's."""

from virtual_astribot.client import Astribot

__all__ = ["Astribot"]
