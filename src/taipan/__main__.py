"""`python -m taipan` is `taipan`."""

from taipan.cli.main import main

main()
