"""The command `vera-func`."""
