"""`python -m skipless`: the command line."""

from skipless.cli import main

main(prog_name="skipless")
