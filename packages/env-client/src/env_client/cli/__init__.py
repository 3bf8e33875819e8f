"""The command line as people type it, over draccus' dataclasses and choice types.

    flags -> parse.py -> options.py (what the dataclasses offer) -> values.py (text -> typed value) -> the config
    `--help` -> help.py

draccus gives the choice registries and the decoders for nested values; it rejects dashed names, bare booleans,
`--no-x`, comma lists, repeated flags and a nested choice without its type, so the scanning is ours.
"""

from env_client.cli.configs import find_config_file
from env_client.cli.parse import CliError, fail, host_port, parse

__all__ = ["CliError", "fail", "find_config_file", "host_port", "parse"]
