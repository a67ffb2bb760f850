"""The public ops, one file a family: the maths, the schema, the autograd Function and the checked entrance."""
