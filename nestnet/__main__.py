"""`python -m nestnet`: the command, for where it is not on the path."""

from nestnet.cli.__main__ import main

main()
