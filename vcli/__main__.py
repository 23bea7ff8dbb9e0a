"""`python -m vcli` is `vcli`."""

from vcli.cli import main

main()
