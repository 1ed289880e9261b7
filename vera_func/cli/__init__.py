"""The command-line interface, `vera-func`.

Commands: `main` and `app` parse the command line and report failures. `text_commands` and `file_commands` define the
commands; `options`, `groups` and `parsers` define their options. `routes` chooses the function for a kind of data.

Functions: `demo`, `label_sets` and `language` train adapters, with the steps in `jobs`, `recipe` and `training`.
`commands`, `scoring` and `inspect` evaluate, predict, generate, merge, export and describe; `on_ray` evaluates on a Ray
cluster. `outputs` saves adapters, and `checkpoints` has the paths of checkpoints. `report` and `logs` show and log
results.
"""
