"""The command-line interface, `vera-func`.

Commands: `main` and `app` parse the command line and report failures. `text_commands` and `file_commands` define the
commands, and `options`, `groups` and `parsers` define the options of the commands. `data_kinds` determines the kind of
the data, and refuses options that have no effect on this kind.

Functions: the folder `training` trains adapters. `evaluation` evaluates adapters, and `on_ray` evaluates adapters on a
Ray cluster. `prediction` predicts labels, and `generation` generates texts. `exports` merges, exports and converts
adapters, and `inspection` describes adapters. `report` prints results.
"""
