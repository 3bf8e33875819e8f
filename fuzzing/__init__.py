"""Coverage-guided fuzzing of everything that reads what others wrote: `python -m fuzzing --target wire --executions 100000`.

    command.py     batches, one process each, and what came of them in results.jsonl
    worker.py      one batch: atheris (libFuzzer) over one target, with limits for time and memory
    targets.py     the targets by name, their seeds, and what of the product is instrumented
    wire.py  server.py  gateway.py  files.py     the targets: bytes in, nothing or an error out

A target is a function of bytes. It lets pass the errors that its layer promises, and nothing else; what it raises is
a finding. `tests/fuzz` runs every target over its seeds and over the inputs that were found, without atheris.
"""
