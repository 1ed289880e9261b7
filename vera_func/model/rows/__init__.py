"""Find the batch axis of the input of each layer, for calls with one adapter per row of a batch.

Row i of a batch is index i of axis 0 of the model's inputs. Inside the model, a tensor may have another batch axis, or
none: models transpose (rows, seq) to (seq, rows), flatten rows and seq into one axis, route tokens to experts, or pass
a table of positions through a layer. Sizes alone do not identify the batch axis, because other axes may have the same
size. Therefore, before the first call of each kind, the call is rehearsed:

    A copy of the model runs on the call's inputs. The number of rows is changed to a prime that, if possible, does not
    divide any size of an input or a parameter. At least two runs, with different primes, must agree on a layout.

`follow` tracks the rows through the operations of a run, `rehearse` runs a copy of the model, and `plans` stores the
results for calls of the same kind. `axes` defines the types that the other files share.
"""
