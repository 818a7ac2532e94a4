"""A module for each command of `quest-ops`: DESCRIPTION, add_arguments(parser), run(args) -> exit code."""
