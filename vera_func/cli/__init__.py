"""The command-line interface, `vera-func`.

Commands: `main` and `app` parse the command line and report failures. `text_commands` and `file_commands` define the
commands, and `options`, `groups` and `parsers` define the options of the commands. `routes` calls the training or
evaluation function for the kind of the data.

Functions: `demo`, `label_sets` and `language` train adapters. `jobs` lists the adapters of a run, and `recipe` and
`training` contain the training loops. `commands` and `scoring` evaluate, predict and generate; `on_ray` evaluates on a
Ray cluster. `exports` merges, exports and converts adapters, and `inspect` describes them. `outputs` saves adapters,
and `checkpoints` names checkpoint files. `report` prints results, and `logs` writes training logs.
"""
