"""Lets ``python -m ablate_shards`` run the command line."""

from ablate_shards.cli import main

main()
