"""What the tests of the command line share."""

import sys
from pathlib import Path

import pytest

from dsv4 import cli

sys.path.append(str(Path(__file__).parent.parent / "ops"))  # problems of ops, for the CUDA kernels


@pytest.fixture
def run(capsys):
    """Runs a command line in this process: (exit code, standard output, standard error)."""

    def call(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as leave:
            code = leave.code
        out, err = capsys.readouterr()
        return code, out, err

    return call
