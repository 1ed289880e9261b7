"""The maths of one adapted layer, on torch alone."""
