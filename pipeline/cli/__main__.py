"""`python -m pipeline.cli`, for where the console script is not on the path."""

from pipeline.cli import main

main()
