"""What the tests of the command line share."""

import pytest

from dsv4 import cli


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
