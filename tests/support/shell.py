"""Commands as a shell would run them, and arguments that make a run take a second."""

from typer.testing import CliRunner

from fxlocal.experiments.cli.app import app

FAKE = ["--data", "fake", "--num-train", "64", "--num-test", "20", "--size", "8"]
TINY = [*FAKE, "--model", "resnet8", "--width", "4", "--epochs", "2", "--batch-size", "16"]


def fxlocal(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def succeeds(*arguments):
    result = fxlocal(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments, code=2):
    """Run a command that must end in one clear line, beside notes, and return that line."""
    result = fxlocal(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.strip().splitlines() if line[:6] != "note: "]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]
