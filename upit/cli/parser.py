"""The parser that all commands share."""

from typing import Any


def plain_parser(kind: Any) -> Any:
    """A parser that takes configs by name. Its errors are without the usage of every option."""
    from jsonargparse import ActionConfigFile

    from upit.cli.config_names import ConfigByName
    from upit.cli.errors import explain

    class Parser(kind):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register("action", ActionConfigFile, ConfigByName)

        def error(self, message, ex=None):
            if not self.exit_on_error:  # a class's own arguments, parsed within: the error is told from outside
                super().error(message, ex)
            self.exit(2, f"{self.prog}: error: {explain(message)}\n")

    return Parser
