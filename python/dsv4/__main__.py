"""`python -m dsv4`: the command line."""

import sys

from dsv4.cli import main

sys.exit(main())
