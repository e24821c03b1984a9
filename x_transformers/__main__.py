"""Commands: `python -m x_transformers COMMAND`, or `x-transformers COMMAND` after installation; see `COMMANDS`."""

from __future__ import annotations

import sys

from x_transformers.training.command_line import Parser

COMMANDS = {
    "train": "train a language model on text",
    "generate": "continue a prompt with a trained model",
    "explain": "print features, backends, parameters and operations of each layer of a model",
    "convert": "write the folder of a model, of this library or of transformers",
    "bench": "measure the speed of a preset on this machine",
}


def main() -> None:
    """Run the command that the command line names."""
    listed = "\n".join(f"  {name:<10} {words}" for name, words in COMMANDS.items())
    parser = Parser(
        prog="x-transformers",
        usage="x-transformers COMMAND [OPTIONS]",
        description=f"Commands:\n{listed}\n\n`x-transformers COMMAND --help` lists the options of each.",
    )
    parser.add_argument("command", choices=tuple(COMMANDS), metavar="COMMAND", help="one of these")
    command = parser.parse_args(sys.argv[1:2]).command
    arguments = sys.argv[2:]
    # each command is imported when it is called, since most need more than others
    if command == "train":
        from x_transformers.training.train import train

        train(arguments, prog="x-transformers train", description="Train a language model on text.")
    elif command == "generate":
        from x_transformers.training.generate import generate

        generate(arguments)
    elif command == "explain":
        from x_transformers.training.explain import explain

        explain(arguments)
    elif command == "convert":
        from x_transformers.training.convert import convert

        convert(arguments)
    else:
        from x_transformers.training.bench import bench

        bench(arguments)


if __name__ == "__main__":
    main()
