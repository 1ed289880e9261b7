"""The command-line interface, `vera-func`."""
