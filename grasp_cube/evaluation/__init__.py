"""How often a policy solves a task on the virtual SO-101, over the wire and in-process."""
