"""``llama-bridge completion``: the script that has a shell complete our command lines.

The machinery is click's (docs: "Shell Completion"): the script runs llama-bridge itself with the command line so far in
the environment, and ``click.Group.main`` answers that with what may come next. What is ours is bash's half, because
bash takes ``llama:8b`` for three words, and names with a colon are what models have.
"""

from __future__ import annotations

import os
import re

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from bridge.cli.lazy import COMPLETION

SHELLS = ("bash", "zsh", "fish")
INSTALLING = """Set it up, once, with

\b
bash   llama-bridge completion bash > ~/.local/share/bash-completion/completions/llama-bridge
zsh    llama-bridge completion zsh > DIR/_llama-bridge      # DIR is one of $fpath
fish   llama-bridge completion fish > ~/.config/fish/completions/llama-bridge.fish

or, for this shell alone, with: eval "$(llama-bridge completion bash)"
"""


@click.command(epilog=INSTALLING)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that has a SHELL complete commands, options and the names of models.

    The names are those that a running daemon tells; where there is none, there are none.
    """
    kind = get_completion_class(shell)
    assert kind is not None  # by the choice
    click.echo(kind(ctx.find_root().command, {}, "llama-bridge", COMPLETION).source(), nl=False)


@add_completion_class
class Bash(BashComplete):
    """Sends the line up to the cursor, unsplit, and replies with what bash takes for the rest of its last word.

    bash(1) splits at COMP_WORDBREAKS, where the colon stands, and replaces no more than what follows the last of them.
    """

    source_template = """\
%(complete_func)s() {
    local IFS=$'\\n' type value
    COMPREPLY=()
    while IFS=',' read -r type value; do
        case $type in
        dir) compopt -o dirnames ;;
        file) compopt -o default ;;
        plain) COMPREPLY+=("$value") ;;
        esac
    done < <(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \\
        %(complete_var)s=bash_complete "$1")
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def get_completion_args(self) -> tuple[list[str], str]:
        words, incomplete = self._words()
        return words[1:], incomplete

    def format_completion(self, item: CompletionItem[str]) -> str:
        value = item.value
        incomplete = self._words()[1]
        if ":" in os.environ.get("COMP_WORDBREAKS", "") and item.type == "plain":
            value = value.removeprefix(re.sub("[^:]*$", "", incomplete.rpartition("=")[2]))
        return f"{item.type},{value}"

    def _words(self) -> tuple[list[str], str]:
        """The whole words before the cursor, and the one that it stands in."""
        line = os.environ["COMP_LINE"]
        words = split_arg_string(line)
        incomplete = "" if line[-1:].isspace() or not words else words.pop()
        return words, incomplete
