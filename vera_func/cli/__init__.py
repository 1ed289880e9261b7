"""The command-line interface, `vera-func`.

Commands: `main` and `app` parse the command line and report failures. `text_commands` and `file_commands` define the
commands; `options`, `groups` and `parsers` define their options. `routes` chooses the function for a kind of data.

Functions: `demo`, `label_sets` and `language` train adapters; `jobs`, `recipe` and `training` contain the steps of
training. `commands` and `scoring` evaluate, predict and generate; `on_ray` evaluates on a Ray cluster. `exports`
merges, exports and converts adapters, and `inspect` describes them. `outputs` saves adapters, and `checkpoints` has the
paths of checkpoints. `report` and `logs` show and log results.
"""
