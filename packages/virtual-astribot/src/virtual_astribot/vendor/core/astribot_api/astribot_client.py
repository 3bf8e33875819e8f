"""The stand-in under the import path of the SDK, with the SDK's habit of muting the terminal. Not the vendor's."""

import os

from virtual_astribot.client import Astribot

__all__ = ["Astribot"]

if os.environ.get("ASTRIBOT_LOG") != "1":
    _nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(_nowhere, 1)
    os.dup2(_nowhere, 2)
    os.close(_nowhere)
