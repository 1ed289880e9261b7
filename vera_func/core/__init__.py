"""The maths of one adapted layer; depends on torch only."""
