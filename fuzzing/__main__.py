"""`python -m fuzzing`."""

from fuzzing.command import main

main()
