"""The command-line interface, `vera-func`.

From the command line to the result: `main` and `app` parse it and report failures. `text_commands` and
`file_commands` are the commands, whose options `options`, `groups` and `parsers` define. `routes` chooses a function
by the kind of the data.

The work: `demo`, `label_sets` and `language` train, with the steps in `jobs`, `recipe` and `training`. `commands`,
`scoring` and `inspect` evaluate, predict, generate, merge, export and describe; `on_ray` evaluates on a Ray cluster.
`outputs` and `checkpoints` write adapters and interrupted runs; `report` and `logs` show and log the results.
"""
