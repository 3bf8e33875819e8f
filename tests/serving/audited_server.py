"""`serve_policy`, watched by the interpreter itself: `python audited_server.py FOLDER serve_policy's flags`.

Prints a line for each name that a pickle asks for, wherever it is read, and for each piece of code of FOLDER's, or copied
from there by transformers, that is run.
"""

import os
import sys

WATCHED = sys.argv.pop(1)


def watch(event: str, arguments: tuple) -> None:
    if event == "pickle.find_class":
        print("AUDIT pickle", arguments, flush=True)
    elif event == "exec":
        place = os.path.realpath(arguments[0].co_filename)
        if place.startswith(WATCHED) or "transformers_modules" in place:
            print("AUDIT ran", place, flush=True)


sys.addaudithook(watch)

from grasp_cube.serve_policy import main  # noqa: E402

main()
