"""The training of adapters, for `vera-func demo` and `vera-func train`.

`start` chooses the training function for the data. `classifier` trains an adapter, or a sweep of adapters, on one data
set with labels. `label_sets` trains on several data sets with labels, with one adapter for each data set. `unlabelled`
trains adapters on texts, completions, chats or preferences.

`settings` defines the options of a run, and `jobs` lists the adapters of a run. `loop` contains the training loop.
`labels` defines the batches and the loss of classifiers, and `selection` runs the sweep that selects the best adapter.
`outputs` names and writes the files of a run, and `logs` writes training logs.
"""
